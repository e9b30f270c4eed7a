/*
 * VFIO mediated devices: start before the first open, stop after the last
 * close
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef HW_VFIO_MDEV_H
#define HW_VFIO_MDEV_H

#include "qapi/error.h"
#include "qom/object.h"

/* The header that declares VFIODevice was split after QEMU 10.0. */
#if __has_include("hw/vfio/vfio-device.h")
#include "hw/vfio/vfio-device.h"
#else
#include "hw/vfio/vfio-common.h"
#endif

/* For the property list of every device that has a VFIODevice @_field. */
#define DEFINE_PROP_VFIO_MDEV(_state, _field)                           \
    DEFINE_PROP_ON_OFF_AUTO("mdev-start", _state, _field.mdev_start,    \
                            ON_OFF_AUTO_AUTO)

/* Describe that property. */
void vfio_mdev_class_init(ObjectClass *klass);

/*
 * Before a device is opened: if it is an mdev, start its group when that is
 * QEMU's part.  Does nothing for other devices that can be opened.
 */
bool vfio_mdev_attach_begin(VFIODevice *vbasedev, Error **errp);

/* After the open, or after it has failed; then say more about why. */
void vfio_mdev_attach_end(VFIODevice *vbasedev, bool opened, Error **errp);

/* After a device was closed: stop its group if it was the last member. */
void vfio_mdev_detach(VFIODevice *vbasedev);

/*
 * A device whose descriptor was passed and that has no sysfsdev: set sysfsdev
 * if it is an mdev.
 */
void vfio_mdev_find_by_fd(VFIODevice *vbasedev);

/* The kernel has asked for the device back. */
void vfio_mdev_release_requested(VFIODevice *vbasedev);

/* sysfsdev does not exist, which *@errp says: add how an mdev is created. */
void vfio_mdev_explain_missing(const char *sysfsdev, Error **errp);

#endif /* HW_VFIO_MDEV_H */

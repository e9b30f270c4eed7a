/*
 * For a QEMU without VFIO: there are no mediated devices
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/qapi-commands-vfio-mdev.h"

VfioMdevInfoList *qmp_query_vfio_mdevs(Error **errp)
{
    return NULL;
}

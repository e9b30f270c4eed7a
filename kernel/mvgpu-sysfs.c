// SPDX-License-Identifier: GPL-2.0
/*
 * mvgpu: the attributes of an mdev and of a parent
 *
 * The driver core adds an mdev's after the probe and takes them away, waiting
 * for calls that are in one of them, before the removal.
 */

#include <linux/ctype.h>
#include <linux/pid.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/sysfs.h>

#include "mvgpu-priv.h"

#define MVGPU_PARAMS_MAX	512	/* bytes */

static struct mvgpu_dev *mvgpu_from_dev(struct device *dev)
{
	return dev_get_drvdata(dev);
}

/* The length of a line as echo writes it. */
static size_t mvgpu_line(const char *buf, size_t count)
{
	return count && buf[count - 1] == '\n' ? count - 1 : count;
}

/* Canonical: lower case, with dashes, and not of all zeroes. */
static int mvgpu_parse_group(const char *buf, size_t len, guid_t *uuid)
{
	size_t i;

	*uuid = guid_null;
	if (!len)
		return 0;
	if (len != UUID_STRING_LEN)
		return -EINVAL;
	for (i = 0; i < len; i++)
		if (isupper(buf[i]))
			return -EINVAL;
	if (guid_parse(buf, uuid) || guid_is_null(uuid))
		return -EINVAL;
	return 0;
}

static ssize_t group_uuid_show(struct device *dev,
			       struct device_attribute *attr, char *buf)
{
	struct mvgpu_dev *mv = mvgpu_from_dev(dev);
	guid_t uuid;

	mutex_lock(&mvgpu_group_lock);
	uuid = mv->group->uuid;
	mutex_unlock(&mvgpu_group_lock);

	if (guid_is_null(&uuid))
		return sysfs_emit(buf, "\n");
	return sysfs_emit(buf, "%pUl\n", &uuid);
}

static ssize_t group_uuid_store(struct device *dev,
				struct device_attribute *attr,
				const char *buf, size_t count)
{
	guid_t uuid;
	int ret;

	ret = mvgpu_parse_group(buf, mvgpu_line(buf, count), &uuid);
	if (!ret)
		ret = mvgpu_group_join(mvgpu_from_dev(dev), &uuid);
	return ret ?: count;
}

static ssize_t online_show(struct device *dev, struct device_attribute *attr,
			   char *buf)
{
	return sysfs_emit(buf, "%d\n",
			  mvgpu_group_is_online(mvgpu_from_dev(dev)));
}

static ssize_t online_store(struct device *dev, struct device_attribute *attr,
			    const char *buf, size_t count)
{
	struct mvgpu_dev *mv = mvgpu_from_dev(dev);
	int ret;

	if (mvgpu_line(buf, count) != 1)
		return -EINVAL;
	if (*buf == '1')
		ret = mvgpu_group_online(mv);
	else if (*buf == '0')
		ret = mvgpu_group_offline(mv);
	else
		ret = -EINVAL;
	return ret ?: count;
}

static ssize_t vgpu_params_show(struct device *dev,
				struct device_attribute *attr, char *buf)
{
	struct mvgpu_dev *mv = mvgpu_from_dev(dev);
	ssize_t n;

	mutex_lock(&mvgpu_group_lock);
	n = sysfs_emit(buf, "%s\n", mv->params ?: "");
	mutex_unlock(&mvgpu_group_lock);

	return n;
}

/*
 * The string is the user's business and is kept as it is, whatever it says.
 * One word in it means something here: frame_rate_limiter=0.
 */
static u32 mvgpu_params_frl(struct mvgpu_dev *mv, const char *params)
{
	static const char word[] = "frame_rate_limiter=0";
	const size_t len = sizeof(word) - 1;

	while (*params) {
		size_t n = strcspn(params, ",");

		if (n == len && !memcmp(params, word, len))
			return 0;
		params += n;
		params += *params == ',';
	}
	return mv->type->desc->frl_config;
}

static ssize_t vgpu_params_store(struct device *dev,
				 struct device_attribute *attr,
				 const char *buf, size_t count)
{
	struct mvgpu_dev *mv = mvgpu_from_dev(dev);
	size_t len = mvgpu_line(buf, count);
	char *params;
	size_t i;
	int ret = 0;

	if (len > MVGPU_PARAMS_MAX)
		return -EINVAL;
	for (i = 0; i < len; i++)
		if (!isascii(buf[i]) || !isprint(buf[i]))
			return -EINVAL;

	params = kstrndup(buf, len, GFP_KERNEL);
	if (!params)
		return -ENOMEM;

	mutex_lock(&mvgpu_group_lock);
	if (mv->open || mv->group->online || mv->group->starting) {
		ret = -EBUSY;
	} else {
		mv->frl = mvgpu_params_frl(mv, params);
		swap(mv->params, params);
	}
	mutex_unlock(&mvgpu_group_lock);

	kfree(params);
	return ret ?: count;
}

static ssize_t group_owner_show(struct device *dev,
				struct device_attribute *attr, char *buf)
{
	struct mvgpu_dev *mv = mvgpu_from_dev(dev);
	pid_t owner;

	mutex_lock(&mvgpu_group_lock);
	owner = pid_vnr(mv->group->owner);
	mutex_unlock(&mvgpu_group_lock);

	return sysfs_emit(buf, "%d\n", owner);
}

static ssize_t group_links_show(struct device *dev,
				struct device_attribute *attr, char *buf)
{
	struct mvgpu_dev *mv = mvgpu_from_dev(dev);
	unsigned int links;

	mutex_lock(&mvgpu_group_lock);
	links = mv->group->links;
	mutex_unlock(&mvgpu_group_lock);

	return sysfs_emit(buf, "%u\n", links);
}

static ssize_t group_error_show(struct device *dev,
				struct device_attribute *attr, char *buf)
{
	struct mvgpu_dev *mv = mvgpu_from_dev(dev);
	ssize_t n;

	mutex_lock(&mvgpu_group_lock);
	n = sysfs_emit(buf, "%s\n", mv->group->error ?: "");
	mutex_unlock(&mvgpu_group_lock);

	return n;
}

static DEVICE_ATTR_RW(group_uuid);
static DEVICE_ATTR_RW(online);
static DEVICE_ATTR_RW(vgpu_params);
static DEVICE_ATTR_RO(group_owner);
static DEVICE_ATTR_RO(group_links);
static DEVICE_ATTR_RO(group_error);

static struct attribute *mvgpu_mdev_attrs[] = {
	&dev_attr_group_uuid.attr,
	&dev_attr_online.attr,
	&dev_attr_vgpu_params.attr,
	&dev_attr_group_owner.attr,
	&dev_attr_group_links.attr,
	&dev_attr_group_error.attr,
	NULL,
};

static umode_t mvgpu_mdev_is_visible(struct kobject *kobj,
				     struct attribute *attr, int n)
{
	return mvgpu_has_online ? attr->mode : 0;
}

static const struct attribute_group mvgpu_mdev_group = {
	.attrs = mvgpu_mdev_attrs,
	.is_visible = mvgpu_mdev_is_visible,
};

const struct attribute_group *mvgpu_mdev_groups[] = {
	&mvgpu_mdev_group,
	NULL,
};

static struct mvgpu_parent *mvgpu_parent_of(struct device *dev)
{
	return dev_get_drvdata(dev);
}

static ssize_t p2p_links_show(struct device *dev,
			      struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%u\n", mvgpu_parent_of(dev)->links);
}

static ssize_t p2p_links_free_show(struct device *dev,
				   struct device_attribute *attr, char *buf)
{
	unsigned int left;

	mutex_lock(&mvgpu_group_lock);
	left = mvgpu_parent_of(dev)->links_free;
	mutex_unlock(&mvgpu_group_lock);

	return sysfs_emit(buf, "%u\n", left);
}

static DEVICE_ATTR_RO(p2p_links);
static DEVICE_ATTR_RO(p2p_links_free);

static struct attribute *mvgpu_parent_attrs[] = {
	&dev_attr_p2p_links.attr,
	&dev_attr_p2p_links_free.attr,
	NULL,
};

static const struct attribute_group mvgpu_parent_group = {
	.attrs = mvgpu_parent_attrs,
};

const struct attribute_group *mvgpu_parent_groups[] = {
	&mvgpu_parent_group,
	NULL,
};

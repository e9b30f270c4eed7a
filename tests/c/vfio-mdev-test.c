/*
 * QTest of mediated devices: what can be seen without one
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "libqtest.h"
#include "qobject/qdict.h"
#include "qobject/qlist.h"

#define UUID "7e5a2c1e-52a0-4a6e-a6c3-3d2f4b9e0001"

static void test_query_is_empty(void)
{
    QTestState *qts = qtest_init("-nodefaults -machine none");
    QDict *answer = qtest_qmp(qts, "{ 'execute': 'query-vfio-mdevs' }");

    g_assert(qlist_empty(qdict_get_qlist(answer, "return")));
    qobject_unref(answer);
    qtest_quit(qts);
}

static void test_property(void)
{
    QTestState *qts = qtest_init("-nodefaults -machine none");
    QDict *answer = qtest_qmp(qts, "{ 'execute': 'device-list-properties',"
                              "  'arguments': { 'typename': 'vfio-pci' } }");
    QListEntry *entry;
    bool found = false;

    QLIST_FOREACH_ENTRY(qdict_get_qlist(answer, "return"), entry) {
        QDict *property = qobject_to(QDict, qlist_entry_obj(entry));

        if (!strcmp(qdict_get_str(property, "name"), "mdev-start")) {
            found = true;
            g_assert_cmpstr(qdict_get_str(property, "type"), ==, "OnOffAuto");
            g_assert(strstr(qdict_get_str(property, "description"), "online"));
        }
    }
    g_assert(found);
    qobject_unref(answer);
    qtest_quit(qts);
}

/* What device_add says about a sysfsdev that cannot work. */
static void check_refused(const char *path, const char *options,
                          const char *words)
{
    QTestState *qts = qtest_init("-nodefaults -machine pc");
    QDict *answer, *error;

    answer = qtest_qmp(qts, "{ 'execute': 'device_add', 'arguments': {"
                       "  'driver': 'vfio-pci', 'id': 'dut',"
                       "  'mdev-start': %s, 'sysfsdev': %s } }",
                       options, path);
    error = qdict_get_qdict(answer, "error");
    g_assert(error);
    if (!strstr(qdict_get_str(error, "desc"), words)) {
        g_error("'%s' is not in '%s'", words, qdict_get_str(error, "desc"));
    }
    qobject_unref(answer);
    qtest_quit(qts);
}

static void test_missing_uuid(void)
{
    check_refused("/sys/bus/mdev/devices/" UUID, "auto",
                  access("/sys/bus/mdev/devices", F_OK)
                  ? "module mdev is not loaded"
                  : "mdev_supported_types/TYPE/create");
}

static void test_missing_path(void)
{
    check_refused("/no/such/device", "auto", "no such host device");
}

static void test_no_device(void)
{
    check_refused("/proc", "auto", "is no device");
}

static void test_other_device(void)
{
    if (access("/sys/class/mem/null/subsystem", F_OK)) {
        g_test_skip("there is no /sys/class/mem/null");
        return;
    }
    check_refused("/sys/class/mem/null", "auto", "neither a mediated nor");
    check_refused("/sys/class/mem/null", "on", "is no mediated device");
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    if (!qtest_has_device("vfio-pci")) {
        return g_test_run();
    }
    qtest_add_func("/vfio-mdev/query-is-empty", test_query_is_empty);
    qtest_add_func("/vfio-mdev/property", test_property);
    qtest_add_func("/vfio-mdev/missing-uuid", test_missing_uuid);
    qtest_add_func("/vfio-mdev/missing-path", test_missing_path);
    qtest_add_func("/vfio-mdev/no-device", test_no_device);
    qtest_add_func("/vfio-mdev/other-device", test_other_device);
    return g_test_run();
}

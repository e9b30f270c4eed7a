# SPDX-License-Identifier: GPL-2.0-or-later
#
# make demo           the main job, in the lab, from nothing
# make test           every check and every test
# make test-qemu      the patched QEMUs, built and run with every driver
# make test-crash     mdo killed before and after every step, in the lab
# make test-faults    every step failing, for every reason, in the lab
# make test-libvirt   domains of libvirt, mdo killed and libvirt stopped
# make test-soak      everything at random, for an hour, in the lab
# make test-fuzz      every parser fuzzed for ten minutes each
# make test-fuzz-driver
#                     mvgpu fuzzed on a kernel with checkers, built first
# make test-firmware  guests booted with each QEMU and firmware, in the lab
# make test-qemu-own  QEMU's own tests, patched beside stock: an hour
# make test-fresh     make demo and make test, on a clean Debian 12 and a clean
#                     Debian 13
# make test-dist      the packages, installed and purged on a clean Debian 12 and
#                     a clean Debian 13
# make check          linters only
# make dist           a wheel and Debian packages, into build/dist
# make bench          speeds beside those of others, and docs/benchmarks.md
# make lab-shell      a shell in a lab that stays up until 'mdo lab down'
# make clean          forget what was built; the cache stays

MDO = .venv/bin/mdo
BENCHES = planner host_tree guest_start host_scan devices guests registers qemu_startup

.PHONY: setup demo test test-qemu test-crash test-faults test-libvirt test-soak test-fuzz
.PHONY: test-fuzz-driver test-firmware test-qemu-own test-fresh test-dist check dist bench
.PHONY: lab-shell clean

setup:
	@tools/setup

demo: setup
	@$(MDO) lab demo

test:
	@tools/setup test
	@.venv/bin/python tools/run-tests

test-qemu: setup
	@.venv/bin/python tools/run-tests qemu-build matrix-6.12 matrix-6.1 lab-6.12-iommufd

test-crash: setup
	@.venv/bin/python tools/run-tests crash-6.12

test-faults: setup
	@.venv/bin/python tools/run-tests faults-6.12

test-libvirt:
	@tools/setup libvirt
	@.venv/bin/python tools/run-tests libvirt-6.12

test-soak: setup
	@.venv/bin/python tools/run-tests soak-6.12

test-fuzz:
	@tools/setup fuzz
	@.venv/bin/python tools/run-tests fuzz-parsers

test-fuzz-driver:
	@tools/setup kernel
	@.venv/bin/python tools/run-tests fuzz-6.12-debug

test-firmware: setup
	@$(MDO) qemu build --series 10.0 >/dev/null && $(MDO) qemu build --series 10.2 >/dev/null
	@.venv/bin/python tools/run-tests firmware-6.12 firmware-6.12-iommufd firmware-7.3 firmware-7.3-iommufd firmware-6.1

test-qemu-own: setup
	@.venv/bin/python tools/run-tests qemu-own

test-fresh:
	@failed=; for suite in bookworm trixie; do \
		echo "== $$suite"; \
		tools/fresh $$suite || failed=1; \
	done; [ -z "$$failed" ]

test-dist: setup
	@.venv/bin/python tools/run-tests dist

check: setup
	@.venv/bin/python tools/run-tests check

# WITH=qemu also has the source package of the patched QEMU
dist:
	@tools/setup dist
	@tools/dist $(WITH)

# ROUNDS=2 is a quick try of all
bench:
	@tools/setup bench
	@for bench in $(BENCHES); do \
		echo "== $$bench"; \
		.venv/bin/python benches/$$bench.py $(if $(ROUNDS),--rounds $(ROUNDS)) || failed=1; \
	done; .venv/bin/python benches/publish.py && [ -z "$$failed" ]

lab-shell: setup
	@$(MDO) lab up --pci 1
	@$(MDO) lab shell

clean:
	rm -rf build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find python tests tools -name __pycache__ -prune -exec rm -rf {} +

# Everything one does here, from a bare Debian machine on: what is missing is installed with apt-get.

PREFIX ?= /usr/local
LANE ?= nspawn
SUITE ?= trixie
# Of the chaos: how long in each lane, and more arguments (CHAOS='--seed 7 --disturb kill'). It goes through
# both lanes unless one is named.
MINUTES ?= 30
CHAOS ?=
CHAOS_LANES := $(if $(filter file,$(origin LANE)),nspawn vm,$(LANE))
CARGO_TARGET_DIR ?= target
export CARGO_TARGET_DIR := $(abspath $(CARGO_TARGET_DIR))

NAME := containerd-shim-systemd-v1
BINARY := $(CARGO_TARGET_DIR)/release/$(NAME)
SCRIPTS := tests/testbed
UNITS := $(wildcard units/*.socket units/*.service units/*.slice units/*.in)
UNITDIR := $(DESTDIR)$(PREFIX)/lib/systemd/system

.PHONY: help deps build unit check test test-unit test-vm test-nspawn test-matrix shell demo chaos bench doc install clean
.DEFAULT_GOAL := help

# A static binary starts in half the time, and is started for every container and every exec.
STATIC := -C target-feature=+crt-static

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

deps:
	@$(SCRIPTS)/deps build

build: deps ## the release binary
	cargo rustc --release --locked --bin containerd-shim-systemd-v1 -- $(STATIC)

unit: test-unit ## the same as test-unit

check: deps ## formatting, clippy, documentation, dependencies (where cargo-deny or cargo-audit is there)
	@$(SCRIPTS)/deps lint
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	RUSTDOCFLAGS=-Dwarnings cargo doc --locked --no-deps --document-private-items
	@if command -v cargo-deny >/dev/null; then set -x; cargo deny --locked check; \
	else echo "check: cargo-deny is not installed, skipping licences and sources"; fi
	@if command -v cargo-audit >/dev/null; then set -x; cargo audit; \
	else echo "check: cargo-audit is not installed, skipping advisories"; fi

test: ## all tests: unit, end to end in nspawn and, but for the slowest, in a VM; the core on other suites; a minute of chaos
	@$(SCRIPTS)/run-all unit nspawn core/bookworm core/forky chaos/nspawn vm

test-unit: ## the tests that need nothing but cargo
	@$(SCRIPTS)/run-all unit

test-vm: ## the end-to-end tests in a VM (SUITE=bookworm|trixie|forky)
	@$(SCRIPTS)/run-all vm/$(SUITE)

test-nspawn: ## the end-to-end tests in an nspawn container: fast, without limits
	@$(SCRIPTS)/run-all nspawn/$(SUITE)

test-matrix: ## the end-to-end tests in a VM of each suite: systemd 252 to 262, containerd 1.6 to 2.1
	@$(SCRIPTS)/run-all vm/bookworm vm/trixie vm/forky

shell: ## a shell in a guest with the binary in it (LANE=vm|nspawn, SUITE); destroyed afterwards
	@$(SCRIPTS)/run-shell $(LANE) $(SUITE)

demo: ## containers as systemd units, shown in a guest
	@$(SCRIPTS)/demo

chaos: ## clients at work while the daemon, systemd, dbus and containerd go and come back (MINUTES=30, LANE)
	@set -e; for lane in $(CHAOS_LANES); do $(SCRIPTS)/run-chaos $$lane $(SUITE) --minutes $(MINUTES) $(CHAOS); done

bench: ## side by side with runc.v2, in nspawn; results in target/bench.json
	@$(SCRIPTS)/run-bench nspawn $(SUITE)

doc: deps ## the documentation of the code, private items too
	cargo doc --locked --no-deps --document-private-items

$(BINARY):
	$(MAKE) build

install: $(BINARY) ## the binary and the units (DESTDIR, PREFIX=/usr/local)
	install -D -m 755 $(BINARY) $(DESTDIR)$(PREFIX)/bin/$(NAME)
	install -d $(UNITDIR)
	@set -e; for unit in $(UNITS); do \
		target=$(UNITDIR)/$$(basename $$unit .in); \
		echo "$$unit -> $$target"; \
		sed 's|@BINDIR@|$(PREFIX)/bin|g' $$unit >$$target; chmod 644 $$target; \
	done

clean: ## what was built here (images of the testbed are kept elsewhere: testbed help)
	cargo clean

# Every task of a developer has a target here. `deps`, `demo`, the tests, `chaos`, `bench` and `shell` install
# missing Debian packages with apt-get; no other target changes the machine.

PREFIX ?= /usr/local
CARGO ?= cargo
LANE ?= nspawn
SUITE ?= trixie
# For `chaos`: minutes in each lane, and more arguments (CHAOS='--seed 7 --disturb kill'). Without LANE it runs
# in both lanes.
MINUTES ?= 30
CHAOS ?=
# Arguments of `bench`.
BENCH ?=
# For `soak`.
CONTAINERS ?= 10000
EXECS ?= 50000
CHAOS_LANES := $(if $(filter file,$(origin LANE)),nspawn vm,$(LANE))
# For `fuzz`.
SECONDS ?= 60
TARGET ?=
CARGO_TARGET_DIR ?= target
export CARGO_TARGET_DIR := $(abspath $(CARGO_TARGET_DIR))

NAME := containerd-shim-systemd-v1
BUILT := $(CARGO_TARGET_DIR)/release/$(NAME)
BINARY := $(BUILT)
SCRIPTS := tests/testbed
UNITS := $(wildcard units/*.socket units/*.service units/*.slice)
UNITDIR := $(DESTDIR)$(PREFIX)/lib/systemd/system
PAGES := $(wildcard packaging/man/*.[157])
SHARE := $(DESTDIR)$(PREFIX)/share
# What the binary is made of.
SOURCES := Cargo.toml Cargo.lock build.rs proto src

.PHONY: help deps build unit coverage check audit test test-all test-failing test-unit test-vm test-nspawn test-clients test-packages test-matrix
.PHONY: shell demo chaos fuzz bench bench-pods soak
.PHONY: doc
.PHONY: fresh install install-files uninstall clean manual deb rpm
.DEFAULT_GOAL := help

# systemd starts the binary for every container and every exec: a static one starts in half the time.
STATIC := -C target-feature=+crt-static

# cargo-deny asks only for crates that this machine has downloaded: those for itself.
HOST = $(shell rustc -vV | sed -n 's/^host: //p')

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

deps: ## install what building and checking need (apt-get, rustup); run it as root
	@$(SCRIPTS)/deps build lint

# The compiler links libc.a, which Fedora does not install with the C compiler. cargo leaves the binary as it is if no change of
# its sources matters: touch marks that it is up to date with them.
build: ## the release binary
	@command -v $(CC) >/dev/null || { echo "build: there is no C compiler ($(CC)): apt install gcc libc6-dev," \
		"or dnf install gcc glibc-static" >&2; exit 1; }
	@case $$($(CC) -print-file-name=libc.a) in */*) ;; *) echo "build: $(CC) does not find libc.a, which a static binary" \
		"needs: apt install libc6-dev, or dnf install glibc-static" >&2; exit 1 ;; esac
	$(CARGO) rustc --release --locked --bin $(NAME) -- $(STATIC)
	@touch $(BUILT)

unit: test-unit ## the same as test-unit

# Columns of the report: 1 file, 8 lines, 9 missed lines. A file at the top is a module of its own. What only tests
# consist of does not count.
coverage: ## which part of the lines the unit tests run, by module; needs cargo-llvm-cov
	@cargo llvm-cov --version >/dev/null 2>&1 || { echo "coverage: install it by" \
		"'rustup component add llvm-tools' and 'cargo install --locked cargo-llvm-cov'" >&2; exit 1; }
	@cargo llvm-cov --locked --lib --bins --summary-only \
		--ignore-filename-regex '(simulation/.*|fuzzing/.*|fake|fake/calls|tests|model|layers|effects)\.rs$$' | awk ' \
		$$1 ~ /\.rs$$/ || $$1 == "TOTAL" { split($$1, path, "/"); of = path[1]; lines[of] += $$8; missed[of] += $$9 } \
		END { for (of in lines) printf "%-14s %6d lines %6.1f %%\n", of, lines[of], \
			100 - 100 * missed[of] / lines[of] | "sort" }'

# `--all-targets` leaves out targets with `test = false`: they are named.
check: ## formatting, clippy, documentation and, where cargo-deny is installed, licences and sources; works offline
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	cargo clippy --locked --features faults --test e2e --test clients --test packages --test chaos --lib --bins -- -D warnings
	RUSTDOCFLAGS=-Dwarnings cargo doc --locked --no-deps --document-private-items
	@if command -v cargo-deny >/dev/null; then set -x; \
		cargo deny --locked --offline --target $(HOST) check bans licenses sources; \
	else echo "check: cargo-deny is not installed: skipping licences and sources"; fi

audit: ## known vulnerabilities of the dependencies, with cargo-deny; needs the network
	cargo deny --locked check advisories

test: ## unit tests; end-to-end tests in nspawn, in a VM (without the slowest), on two other suites; Docker and CRI; the package; a minute of chaos
	@E2E_CYCLES=100 E2E_EXECS=400 $(SCRIPTS)/run-all unit nspawn --beside vm \
		--beside clients/nspawn core/forky core/bookworm pods/forky packages/trixie chaos/nspawn page

test-all: ## every test there is, which takes hours where QEMU emulates: whole suites in VMs, the package on each suite, clients while the daemon is killed
	@CLIENTS_MODES='undisturbed kill kill-cgroup' $(SCRIPTS)/run-all unit page nspawn clients/nspawn \
		packages/bookworm packages/trixie packages/forky pods/forky chaos/nspawn chaos/nspawn/forky clients/vm checkpoints/forky vm/bookworm vm/trixie vm/forky

test-failing: ## in a test build, the step after each fault point fails, in each way in which it can: minutes
	@E2E_FAILURE=all $(SCRIPTS)/run-e2e nspawn trixie failing_points::

test-unit: ## the tests that need nothing but cargo
	@$(SCRIPTS)/run-all unit

test-vm: ## the end-to-end tests in a VM (SUITE=bookworm|trixie|forky)
	@$(SCRIPTS)/run-all vm/$(SUITE)

test-nspawn: ## the end-to-end tests in an nspawn container: fast, without limits (SUITE)
	@$(SCRIPTS)/run-all nspawn/$(SUITE)

test-clients: ## Docker and CRI with this runtime: undisturbed, while the daemon is killed, and in a VM with its limits
	@CLIENTS_MODES='undisturbed kill kill-cgroup' $(SCRIPTS)/run-all clients/nspawn
	@$(SCRIPTS)/run-all clients/vm

test-packages: ## install, upgrade under load, downgrade, remove and purge the Debian package, in a guest (SUITE)
	@$(SCRIPTS)/run-all packages/$(SUITE)

test-matrix: ## the end-to-end tests in a VM of each suite: systemd 252, 257, 262; containerd 1.6, 1.7, 2.1
	@$(SCRIPTS)/run-all vm/bookworm vm/trixie vm/forky

shell: ## a shell in a throw-away guest with the binary (LANE=vm|nspawn, SUITE)
	@$(SCRIPTS)/run-shell $(LANE) $(SUITE)

demo: ## show containers as systemd units, in a guest (LANE)
	@$(SCRIPTS)/demo $(if $(filter file,$(origin LANE)),,$(LANE))

fuzz: ## random input for every parser, each for SECONDS=60 (TARGET=name for one); installs cargo-fuzz
	@$(SCRIPTS)/run-fuzz $(SECONDS) $(TARGET)

chaos: ## clients at work while daemon, systemd, dbus and containerd are killed and restarted (MINUTES=30, LANE)
	@set -e; for lane in $(CHAOS_LANES); do $(SCRIPTS)/run-chaos $$lane $(SUITE) --minutes $(MINUTES) $(CHAOS); done

bench: ## compare with runc.v2, in nspawn; plots in target/bench.html (BENCH='--only cpu')
	@$(SCRIPTS)/run-bench nspawn $(SUITE) $(BENCH)

bench-pods: ## compare pods with those of runc.v2 and a pause container, in a VM: that needs cgroup controllers (PODS=20)
	@CLIENTS_SANDBOXER=shim CLIENTS_COST=$(or $(PODS),20) $(SCRIPTS)/run-clients vm forky cri_cost

soak: ## many containers and execs in a row (CONTAINERS=10000, EXECS=50000): nothing may grow
	@$(SCRIPTS)/run-bench nspawn $(SUITE) --soak $(CONTAINERS),$(EXECS)

doc: ## the documentation of the code, private items too
	cargo doc --locked --no-deps --document-private-items

# Root often has no cargo, or one that is too old (`sudo make install`). It is not needed for a binary that is newer than its
# sources.
fresh:
	@if [ -e $(BINARY) ] && [ -z "$$(find $(SOURCES) -newer $(BINARY) -print -quit)" ]; then \
		:; \
	elif [ $(BINARY) = $(BUILT) ] && command -v $(CARGO) >/dev/null; then \
		$(MAKE) --no-print-directory build; \
	else \
		echo "install: $(BINARY) is missing or older than its sources: run 'make build' first" >&2; exit 1; \
	fi

# Two prerequisites would run at the same time with `make -j`.
install: fresh ## the binary, units, manual and completion (DESTDIR, PREFIX=/usr/local); builds what is out of date
	@$(MAKE) --no-print-directory install-files
	@# Transient units would take the place of the installed ones, and can't be enabled. systemd does not look below every PREFIX.
	@case $(UNITDIR) in /usr/lib/systemd/system | /usr/local/lib/systemd/system) \
		rm -f $(addprefix /run/systemd/transient/,$(NAME).socket $(NAME).service) ;; esac

# Files are replaced by rename: containerd and systemd may use them at any moment.
install-files:
	install -d $(DESTDIR)$(PREFIX)/bin
	install -m 755 $(BINARY) $(DESTDIR)$(PREFIX)/bin/.$(NAME).new
	mv -f $(DESTDIR)$(PREFIX)/bin/.$(NAME).new $(DESTDIR)$(PREFIX)/bin/$(NAME)
	install -d $(UNITDIR)
	@set -e; for unit in $(UNITS); do \
		target=$(UNITDIR)/$$(basename $$unit); \
		echo "$$unit -> $$target"; \
		sed 's|@BINDIR@|$(PREFIX)/bin|g' $$unit >$$target.new; chmod 644 $$target.new; mv -f $$target.new $$target; \
	done
	@set -e; for page in $(PAGES); do \
		directory=$(SHARE)/man/man$${page##*.}; install -d $$directory; \
		gzip -9n <$$page >$$directory/$$(basename $$page).gz; \
	done
	install -D -m 644 packaging/completion/$(NAME).bash $(SHARE)/bash-completion/completions/$(NAME)
	install -D -m 644 packaging/completion/$(NAME).zsh $(SHARE)/zsh/site-functions/_$(NAME)
	install -D -m 644 packaging/completion/$(NAME).fish $(SHARE)/fish/vendor_completions.d/$(NAME).fish

uninstall: ## remove what install has put there (DESTDIR, PREFIX); docs/install.md says what to do before
	rm -f $(DESTDIR)$(PREFIX)/bin/$(NAME) $(addprefix $(UNITDIR)/,$(notdir $(UNITS))) \
		$(foreach page,$(PAGES),$(SHARE)/man/man$(patsubst .%,%,$(suffix $(page)))/$(notdir $(page)).gz) \
		$(SHARE)/bash-completion/completions/$(NAME) $(SHARE)/zsh/site-functions/_$(NAME) \
		$(SHARE)/fish/vendor_completions.d/$(NAME).fish

deb: build ## a Debian package in target/packages, with dpkg-deb; lintian checks it where it is installed
	@set -e; package=$$(packaging/deb/build $(BINARY)); echo "$$package"; \
	if command -v lintian >/dev/null; then lintian --allow-root --fail-on error,warning "$$package"; \
	else echo "deb: lintian is not installed: the package is not checked"; fi

rpm: build ## an RPM package in target/packages, with rpmbuild
	@packaging/rpm/build $(BINARY)

manual: ## write man pages, completion and docs/commands.md again, after a change of src/manual or docs
	UPDATE_MANUAL=1 cargo test --quiet --locked --lib manual::

clean: ## remove what was built here; images of the testbed are elsewhere (testbed help)
	cargo clean

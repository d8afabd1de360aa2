# Each target does its own set-up: what is missing is installed with apt, built, or fetched.

CARGO ?= cargo
ROUNDS ?= 20
# Of fuzzing, for each target. The shell has a variable of this name, which make does not see.
SECONDS ?= 60
# Both ends of NVMe/TCP in virtual time, with faults: the feature is in no other build.
SIMULATION = -p nvmf --features sim --lib --test simulation
# The guest tests use the release build of the daemon, or the one that VHOST_NVMF_BIN names.
GUEST_TESTS = $(CARGO) test -p guest-tests --test linux_guest -- --nocapture --test-threads=1

# Every test process runs under valgrind; what it complains about fails the test. Few random cases: each takes 30 times as
# long. What moves much data, or feeds the same bytes again at every cut, is left out for the same reason. So
# is a race between threads: valgrind runs one at a time, and not fairly.
SANITIZE = PROPTEST_CASES=16 $(CARGO) test \
	--config 'target."cfg(all())".runner = ["valgrind", "-q", "--error-exitcode=9", "--leak-check=no"]'

# Where `make install` puts the program, and the description that management software finds it by.
PREFIX ?= /usr/local
VHOST_USER_DIR ?= /usr/share/qemu/vhost-user

.PHONY: help boot test guest-test sanitize fuzz soak bench install

help:
	@echo 'make boot               boot a Linux guest from a remote NVMe/TCP namespace and have it check its disk'
	@echo 'make boot ARGS=--shell  the same, with a shell in the guest instead of the checks'
	@echo 'make test               every test, guests included (under 25 minutes on 2 cores)'
	@echo 'make guest-test         only the tests that boot guests'
	@echo 'make sanitize           the tests of memory that is reached by address, under valgrind (about three minutes)'
	@echo 'make fuzz [SECONDS=60]  fuzz each target for so long, where a nightly toolchain and cargo-fuzz are there'
	@echo 'make soak [ROUNDS=20]   the tests again and again, by hand'
	@echo 'make install            install the release build below PREFIX=/usr/local, and its description for QEMU and libvirt'
	@echo 'make bench              measure the daemon beside other back-ends; ARGS=--help tells more'

boot:
	@qemu-scripts/boot $(ARGS)

test:
	qemu-scripts/install-packages build guest
	$(CARGO) test --workspace --exclude guest-tests --no-fail-fast
	$(CARGO) test $(SIMULATION)
	$(CARGO) test -p guest-tests --lib --bins
	$(MAKE) --no-print-directory guest-test

guest-test:
	qemu-scripts/install-packages build guest
	$(if $(VHOST_NVMF_BIN),,$(CARGO) build --release -p vhost-nvmf)
	$(GUEST_TESTS)

# Memory descriptions, the NVMe/TCP machine, and both ends of queue pairs over sockets and within the process. Without targets
# that have a vhost-user session: the message library sends padding that nobody has written, which valgrind reports.
sanitize:
	qemu-scripts/install-packages build sanitize
	$(SANITIZE) -p memdesc --tests
	$(SANITIZE) -p fuzz-targets --test corpora its_corpus -- --skip chain:: --skip session::
	$(SANITIZE) -p nvmf --test tcp_machine -- --skip wire:: --skip a_stream_may_be_cut \
		--skip r2ts_of_a_large_write --skip tags_of_all_commands
	$(SANITIZE) -p nvmf --test tcp_pair --test loopback_pair -- --skip data_of_every_size_survives \
		--skip memory_that_changes_while_it_is_sent

# The corpora themselves are replayed by `make test`.
fuzz:
	fuzz/run $(SECONDS)

# Runs that hit another interleaving each time, then one guest that goes through its cases ROUNDS times.
soak:
	qemu-scripts/install-packages build guest
	set -e; for round in $$(seq $(ROUNDS)); do \
		echo "== round $$round of $(ROUNDS)"; \
		PROPTEST_CASES=10000 VHOST_NVMF_ROUNDS=20 $(CARGO) test --release --workspace --exclude guest-tests; \
		SIM_FIRST=$${round}00000 SIM_SEEDS=100000 $(CARGO) test --release $(SIMULATION); \
	done
	$(if $(VHOST_NVMF_BIN),,$(CARGO) build --release -p vhost-nvmf)
	VHOST_NVMF_ROUNDS=$(ROUNDS) $(GUEST_TESTS)

# A contender whose program is not there is skipped, and said to be.
bench:
	qemu-scripts/install-packages build
	$(if $(VHOST_NVMF_BIN),,$(CARGO) build --release -p vhost-nvmf)
	$(CARGO) bench -q -p nvmf --bench machine
	$(CARGO) run --release -p bench -- $(ARGS)

install:
	$(CARGO) build --release -p vhost-nvmf
	install -D -m 755 target/release/vhost-nvmf $(DESTDIR)$(PREFIX)/bin/vhost-nvmf
	install -d $(DESTDIR)$(VHOST_USER_DIR)
	sed 's|/usr/local/bin/|$(PREFIX)/bin/|' qemu-scripts/50-vhost-nvmf.json >$(DESTDIR)$(VHOST_USER_DIR)/50-vhost-nvmf.json

# The two that matter: `make demo` shows the main job, `make test` proves it. Both need Go and Debian 12 or later, install what
# else they lack (as root without asking, otherwise they say what to install), and keep what takes long to make (a kernel, an
# image) under the user's cache directory.

export CGO_ENABLED := 0
GO := go
RELEASE := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
# How long each fuzz target runs.
FUZZTIME ?= 60s
# Where the test machine, which has no KVM to help it, gives up.
VM := bin/hfvm -timeout 20m
# What runs in it, as KERNEL:PACKAGE: the engine that needs its kernels, with and without `restore`; everything end to end on that engine; kills
# of the daemon at random; power cut from its disk; and a daemon under a real systemd.
VM_TESTS := 6.12:fscache/cachefiles 6.12:tests/e2e 6.12:tests/kill 6.12:tests/power 6.12:tests/systemd 6.1:fscache/cachefiles 6.1:tests/e2e 6.1:tests/power
# How many kills tests/kill does in the test machine, where everything takes ten times as long as natively.
VM_KILLS ?= 20
# How many times `make drill` kills the daemon on each engine, at random.
KILLS ?= 2000
# How many times it cuts the power on each of four file systems.
CUTS ?= 25

.PHONY: all build demo test lint bench vm schedules drill drill-full fuzz deps clean

all: build

# The product, the same with the points at which tests kill it, and the program that runs a command in the test machine.
build:
	$(GO) build -trimpath -ldflags '-s -w -X main.release=$(RELEASE)' -o bin/holdfast ./cmd/holdfast
	$(GO) build -trimpath -tags crashpoints -o bin/holdfast-points ./cmd/holdfast
	$(GO) build -o bin/hfvm ./tests/vm/hfvm

demo: build
	$(GO) run ./tests/deps mmdebstrap zstd
	$(GO) run ./tests/demo -holdfast bin/holdfast -vm "$(VM) --"

test: deps lint schedules vm
	CGO_ENABLED=1 $(KILL_ENV) $(GO) test -race -timeout 25m ./...
	$(GO) test -count=1 -tags crashpoints ./state ./handover

# What tests of the whole program are given.
KILL_ENV := HOLDFAST_BIN=$(CURDIR)/bin/holdfast HOLDFAST_BIN_POINTS=$(CURDIR)/bin/holdfast-points

# 100,000 schedules of crashes, upgrades and faults on the simulated kernels, without the race detector: nothing in them runs at once.
schedules:
	$(GO) test -count=1 -v -run 'TestSchedules$$' ./fscache/simkernel

deps:
	$(GO) run ./tests/deps gcc libc6-dev dmsetup erofs-utils e2fsprogs xfsprogs zstd xz-utils

lint:
	@files=$$(gofmt -l .); test -z "$$files" || { echo "not formatted, run gofmt -w on:"; echo "$$files"; exit 1; }
	$(GO) vet ./...
	$(GO) tool staticcheck ./...
	$(GO) tool depguard ./...

# Builds the test kernels where they are not cached (some minutes each), and runs VM_TESTS on them.
vm: build
	set -e; for t in $(VM_TESTS); do \
		kernel=$${t%%:*}; p=$${t#*:}; name=$$(basename $$p); flags=; args=; \
		if [ $$name = systemd ]; then flags=-systemd; fi; \
		if [ $$name = kill ]; then args="-test.run TestRandomKills"; fi; \
		$(GO) test -c -o bin/$$name.test ./$$p; \
		echo "== $$p in the test machine, Linux $$kernel"; \
		(cd $$p && $(KILL_ENV) HOLDFAST_ENGINE=cachefiles HOLDFAST_KILLS=$(VM_KILLS) \
			$(CURDIR)/$(VM) -series $$kernel $$flags -- $(CURDIR)/bin/$$name.test -test.timeout 18m $$args); \
	done

# Harm on purpose, with figures: random kills of the daemon on both engines, what the kills must notice when a safety is taken out, power that is
# cut, and the drill that operators have, with its report in drill-report/.
drill: build
	$(KILL_ENV) HOLDFAST_KILLS=$(KILLS) $(GO) test -count=1 -v -timeout 40m -run TestRandomKills ./tests/kill
	$(GO) test -c -o bin/kill.test ./tests/kill
	for kernel in 6.12 6.1; do (cd tests/kill && $(KILL_ENV) HOLDFAST_ENGINE=cachefiles HOLDFAST_KILLS=$(KILLS) \
		$(CURDIR)/bin/hfvm -timeout 100m -series $$kernel -- $(CURDIR)/bin/kill.test -test.v -test.timeout 95m -test.run TestRandomKills) || exit 1; done
	$(KILL_ENV) HOLDFAST_DRILL=1 $(GO) test -count=1 -v -timeout 40m -run TestMutations ./tests/kill
	$(KILL_ENV) HOLDFAST_POWER=$(CUTS) $(GO) test -count=1 -v -timeout 40m ./tests/power
	$(GO) test -c -o bin/power.test ./tests/power
	cd tests/power && $(KILL_ENV) HOLDFAST_ENGINE=cachefiles HOLDFAST_POWER=$(CUTS) \
		$(CURDIR)/bin/hfvm -timeout 60m -- $(CURDIR)/bin/power.test -test.v -test.timeout 55m
	bin/holdfast drill --own-daemon --duration 3m --report drill-report

# Everything that can be enumerated: every point at every hit, every pair of a kill and a kill of its recovery, every system call.
drill-full: drill
	$(KILL_ENV) HOLDFAST_DRILL=full $(GO) test -count=1 -v -timeout 8h -run 'TestKillAt|TestKillDuring' ./tests/kill

# Ratios against bare handlers in one run; never part of a test.
bench: build
	$(GO) run ./tests/deps curl erofs-utils mmdebstrap zstd
	$(GO) run ./tests/bench -holdfast bin/holdfast

fuzz:
	@set -e; for p in $$($(GO) list ./...); do \
		for f in $$($(GO) test -list '^Fuzz' $$p | grep '^Fuzz' || true); do \
			echo "== $$p $$f"; $(GO) test -run '^$$' -fuzz "^$$f$$" -fuzztime $(FUZZTIME) $$p; \
		done; done

clean:
	rm -rf bin

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
# What runs in it: the engine that needs its kernel, and everything end to end on that engine.
VM_TESTS := fscache/cachefiles tests/e2e

.PHONY: all build demo test lint bench vm fuzz deps clean

all: build

# The product, and the program that runs a command in the test machine.
build:
	$(GO) build -trimpath -ldflags '-s -w -X main.release=$(RELEASE)' -o bin/holdfast ./cmd/holdfast
	$(GO) build -o bin/hfvm ./tests/vm/hfvm

demo: build
	$(GO) run ./tests/deps mmdebstrap zstd
	$(GO) run ./tests/demo -holdfast bin/holdfast -vm "$(VM) --"

test: deps lint vm
	CGO_ENABLED=1 HOLDFAST_BIN=$(CURDIR)/bin/holdfast $(GO) test -race -timeout 20m ./...

deps:
	$(GO) run ./tests/deps gcc libc6-dev erofs-utils e2fsprogs xfsprogs zstd xz-utils

lint:
	@files=$$(gofmt -l .); test -z "$$files" || { echo "not formatted, run gofmt -w on:"; echo "$$files"; exit 1; }
	$(GO) vet ./...
	$(GO) tool staticcheck ./...
	$(GO) tool depguard ./...

# Builds the test kernel where it is not cached (some minutes), and runs VM_TESTS on it.
vm: build
	for p in $(VM_TESTS); do $(GO) test -c -o bin/$$(basename $$p).test ./$$p || exit 1; done
	for p in $(VM_TESTS); do \
		echo "== $$p in the test machine"; \
		(cd $$p && HOLDFAST_BIN=$(CURDIR)/bin/holdfast HOLDFAST_ENGINE=cachefiles \
			$(CURDIR)/$(VM) -- $(CURDIR)/bin/$$(basename $$p).test -test.timeout 15m) || exit 1; \
	done

# Ratios against bare handlers in one run; never part of a test.
bench: build
	$(GO) run ./tests/deps erofs-utils mmdebstrap zstd
	$(GO) run ./tests/bench -holdfast bin/holdfast

fuzz:
	@set -e; for p in $$($(GO) list ./...); do \
		for f in $$($(GO) test -list '^Fuzz' $$p | grep '^Fuzz' || true); do \
			echo "== $$p $$f"; $(GO) test -run '^$$' -fuzz "^$$f$$" -fuzztime $(FUZZTIME) $$p; \
		done; done

clean:
	rm -rf bin

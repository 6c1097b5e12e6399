// Package e2e tests holdfast as it is used: the real binary, a keeper, a daemon, real kernel mounts, a real registry.
//
// The same test binary runs natively with the fanotify engine and in the test VM with the cachefiles engine; HOLDFAST_BIN
// names the holdfast binary, HOLDFAST_ENGINE the engine the tests must run with. Where HOLDFAST_ENGINE is not set the
// engine is what this kernel offers.
package e2e

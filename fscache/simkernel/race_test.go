//go:build race

package simkernel_test

// slowdown is how much longer schedules take under the race detector. They have no goroutines that could race: make test runs them
// all without it.
const slowdown = 20

//go:build race

package daemon

// slowdown is how much fewer schedules are run under the race detector.
const slowdown = 10

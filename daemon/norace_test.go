//go:build !race

package daemon

const slowdown = 1

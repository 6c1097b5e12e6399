//go:build !race

package simkernel_test

const slowdown = 1

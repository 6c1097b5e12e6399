// Package trace does the same steps on a real kernel and on the simulated one, and compares what comes of each: what the simulator
// promises the kernel was seen to do.
//
// A script is done in a test of each engine, below the engine, in lockstep with fscache/simkernel's model; what the kernel did is
// recorded in fscache/simkernel/testdata, and every test run replays the records on the model. It is imported by tests only, and knows no engine.
package trace

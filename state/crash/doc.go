// Package crash names the steps between which a process may die, so that tests can make it die at each of them.
//
// A product build has none of it: [Point] is an empty function. With the build tag "crashpoints" the environment says where to die:
//
//	HOLDFAST_CRASH_DIR  a directory that outlives the process; without it nothing happens
//	HOLDFAST_CRASH      name:n[,name:n...]: die by SIGKILL at the n-th time a process comes by the point. The entries are for one
//	                    life each: when the first has killed a process, the second is for the next process, and so on.
//
// In the directory a file killed-N is made before the N-th kill, and seen-NAME for each point a process came by.
//
// It imports nothing of holdfast, and every package may import it. Names are "package.step.before-what" or "after-what"; the tests list
// them by reading the source, so each call has its name as a literal.
package crash

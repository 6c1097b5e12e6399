// Package killer kills a daemon at the entry or the exit of its k-th system call, counted over all its threads.
//
// strace cannot: its when=N counts in each thread for itself. The package is three roles of one binary, which its TestMain or main
// gives to [Role]:
//
//	killer trace FLAGS -- KEEPER... -- killer filter -- DAEMON...
//
// "trace" starts the keeper under ptrace and follows every process and thread that comes of it, but stops none of them at any
// system call by itself. "filter" becomes the daemon, after it has given itself a seccomp filter that stops the threads of the daemon
// at the system calls of [Set], and at no others: waiting for locks and timers goes at full speed. It has the same process id as the
// daemon, which a supervisor would not talk to otherwise.
//
// At the entry the kernel has done nothing of the call, and does nothing of it once the process is killed
// (__seccomp_filter in kernel/seccomp.c skips the call of a task with a fatal signal pending); at the exit it has done all of it.
//
// Everything under it dies with the tracer (PTRACE_O_EXITKILL). It never decides what is right: it kills, and reports.
package killer

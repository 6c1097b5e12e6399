// Package handover moves file descriptors from one process to the next, so that what they keep alive in the kernel outlives
// the daemon (I4), and moves the daemon's work to another release of it while it runs (I6).
//
// It has three parts:
//
//   - the daemon's side of systemd's file descriptor store ([OpenStore], [Inherited]);
//   - a supervisor for machines or containers without systemd ([Keep]) that speaks the same protocol: a daemon cannot tell the two
//     apart;
//   - hot upgrade ([Start] and [Give] in the old process, [Dial] and [Take] in the new one): PROTOCOL.md.
//
// The supervisor's protocol is sd_notify(3) and sd_listen_fds(3), of which this package speaks:
//
//	to the supervisor, one datagram each, at $NOTIFY_SOCKET, text lines with file descriptors beside them (SCM_RIGHTS):
//	  FDSTORE=1, FDNAME=name, FDPOLL=0   hold the descriptors that come with this under that name
//	  FDSTOREREMOVE=1, FDNAME=name       close what is held under that name
//	  BARRIER=1                          close the one descriptor that comes with this, once all before it is done
//	  MAINPID=pid                        that process, which the sender started, is the daemon from now on
//	  READY=1, STOPPING=1                it serves; it is about to end because it was asked to or has nothing to do
//	  WATCHDOG=1                         it is well
//	  EXTEND_TIMEOUT_USEC=n              its end takes so long (Keep waits for it anyway)
//	  RELOADING=1, STATUS=text           for people
//	from the supervisor, in the environment of each start:
//	  FDSTORE                            how many descriptors it would hold: absent if it holds none
//	  LISTEN_FDS, LISTEN_FDNAMES         that many descriptors from 3 on, and their names, colon-separated
//	  LISTEN_PID                         the process they are for
//	  WATCHDOG_USEC, WATCHDOG_PID        how long that process may go without saying that it is well
//	  SYSTEMD_EXEC_PID                   the process that the supervisor started
//
// The package never knows what a descriptor means: it moves named ones. It never closes a held descriptor unless the daemon asks.
// It kills three things only: a successor that has not been told to read, a predecessor that does not end in time (the successor
// does), and, in [Keep], a daemon whose watchdog is late and what a dead daemon left running.
//
// Invariants kept here:
//   - I2: what a predecessor had in flight is the successor's to answer only when the predecessor has said that it answers no more, or is
//     dead;
//   - I4: [Keep] does not end while it holds a descriptor that is no socket, whoever asks; [Store.Push] returns only when the supervisor
//     has answered a barrier behind the descriptor, and never sends what the supervisor has no room for; OpenStore refuses a supervisor
//     that does not say it has a store, or that would drop what this process sends; [Store.Verify] asks systemd whether it has what it
//     was sent;
//   - I6: the right to read an engine moves with one packet, and comes back only from a process that is dead and never had it; Keep
//     starts the daemon only when nothing of the last one runs, or ever will;
//   - I9: a datagram is taken only from the process that Keep started or the one that took over from it, by the credentials the kernel
//     attaches; an upgrade's peer is the very process that was started, or that started it, of the same user; truncated or malformed messages are
//     dropped with the descriptors in them closed; what is held, sent or received is bounded in number and size.
//
// Dependencies: golang.org/x/sys/unix for control messages, credentials and pidfds; go.uber.org/zap for Keep's log;
// github.com/coreos/go-systemd/v22 (v22.7.0), package dbus, to ask systemd how many descriptors it holds. The rest of go-systemd is not used:
// its notify function cannot send descriptors, and its activation.Files takes what it cannot parse for "nothing was passed", which
// here would lose a lifeline.
package handover

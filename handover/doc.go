// Package handover moves file descriptors from one process to the next, so that what they keep alive in the kernel outlives
// the daemon (I4).
//
// It has the daemon's side of systemd's file descriptor store ([OpenStore], [Inherited]), and a supervisor for machines or
// containers without systemd ([Keep]) that speaks the same protocol: a daemon cannot tell the two apart. The protocol is
// sd_notify(3) and sd_listen_fds(3), of which this package speaks:
//
//	to the supervisor, one datagram each, at $NOTIFY_SOCKET, text lines with file descriptors beside them (SCM_RIGHTS):
//	  FDSTORE=1, FDNAME=name, FDPOLL=0   hold the descriptors that come with this under that name
//	  FDSTOREREMOVE=1, FDNAME=name       close what is held under that name
//	  BARRIER=1                          close the one descriptor that comes with this, once all before it is done
//	  READY=1, STOPPING=1, STATUS=text   for people
//	from the supervisor, in the environment of each start:
//	  FDSTORE                            how many descriptors it would hold: absent if it holds none
//	  LISTEN_FDS, LISTEN_FDNAMES         that many descriptors from 3 on, and their names, colon-separated
//	  LISTEN_PID                         the process they are for
//	  SYSTEMD_EXEC_PID                   the process that the supervisor started
//
// The package never knows what a descriptor means: it moves named ones. It never closes a held descriptor unless the daemon asks,
// and never kills the daemon.
//
// Invariants kept here:
//   - I4: [Keep] does not end while it holds a descriptor, whoever asks; [Store.Push] returns only when the supervisor
//     has answered a barrier behind the descriptor, and OpenStore refuses a supervisor that does not say it has a store, or
//     that would drop what this process sends;
//   - I9: a datagram is taken only from the process that Keep started, by the credentials the kernel attaches; truncated or
//     malformed ones are dropped with the descriptors in them closed; what is held is bounded in number.
//
// Dependencies: golang.org/x/sys/unix for control messages and credentials; go.uber.org/zap for Keep's log.
// github.com/coreos/go-systemd/v22 (v22.7.0) is not used: its notify function cannot send descriptors, and its activation.Files
// takes what it cannot parse for "nothing was passed", which here would lose a lifeline.
package handover

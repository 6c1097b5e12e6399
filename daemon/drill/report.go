package drill

import "time"

// Schema is the version of the form of a [Report]. A later release may add fields to it; what a field means changes only with it.
const Schema = "holdfast.drill/1"

// A Report is what a drill found: drill.json, and what --json prints. Times of day are RFC 3339; names that end with _ns are nanoseconds, and those
// called at_ns count from the start of the drill.
type Report struct {
	Schema   string        `json:"schema"`
	Started  time.Time     `json:"started"`
	Duration time.Duration `json:"duration_ns"` // of the load
	Verdict  Verdict       `json:"verdict"`
	Early    string        `json:"ended_early,omitempty"` // why not all was done that was asked for

	Options     Settings    `json:"options"`
	Environment Environment `json:"environment"`
	Mounts      []Mounted   `json:"mounts"`

	Reads    Reads          `json:"reads"`
	Timeline TimelineReport `json:"timeline"`

	Faults     []Fault     `json:"faults"`          // in their order
	Kinds      []KindTotal `json:"kinds"`           // the table of faults against invariants, with a row for each kind asked for
	Quiet      Violated    `json:"quiet"`           // what was violated while no fault was at work
	Violations []Violation `json:"violations"`      // the first of them, at most 1000
	Notes      []string    `json:"notes,omitempty"` // what the reader of this report should know
}

// A Verdict says whether the drill was passed.
type Verdict struct {
	OK      bool     `json:"ok"`
	I1      bool     `json:"i1"`                // no wrong byte, no error that no fault excuses
	I2      bool     `json:"i2"`                // every read was answered
	Bound   bool     `json:"bound"`             // no stall outlived the bound
	Reasons []string `json:"reasons,omitempty"` // why not
}

// Settings are what the drill was told.
type Settings struct {
	Faults     []Kind        `json:"faults"`
	Duration   time.Duration `json:"duration_ns"` // 0: until Count faults are done
	Count      int           `json:"count"`       // of faults; 0: until Duration is over
	Interval   time.Duration `json:"interval_ns"` // mean pause between two faults
	Hold       time.Duration `json:"hold_ns"`     // how long a fault that lasts is held
	Seed       uint64        `json:"seed"`
	Readers    int           `json:"readers"`
	StallBound time.Duration `json:"stall_bound_ns"`
	Self       bool          `json:"self"`       // on mounts that the drill made
	OwnDaemon  bool          `json:"own_daemon"` // and with a daemon that it started
}

// An Environment is where the drill ran.
type Environment struct {
	Host         string        `json:"host"`
	Kernel       string        `json:"kernel"`
	CPUs         int           `json:"cpus"`
	Drill        string        `json:"drill_release"`  // of the program that ran the drill
	Release      string        `json:"daemon_release"` // of the daemon, at the start
	Engine       string        `json:"engine"`
	EngineReason string        `json:"engine_reason"`
	Supervisor   string        `json:"supervisor"`
	Root         string        `json:"root"`
	ReadDeadline time.Duration `json:"read_deadline_ns"`
}

// A Mounted is an image that was read from.
type Mounted struct {
	Dir     string `json:"dir"`
	Image   string `json:"image"`
	Compare string `json:"compared_with"` // "generator" or "chunk digests"
	Files   int    `json:"files"`
	Bytes   int64  `json:"bytes"`
	LeftOut int    `json:"left_out"` // files that cannot be compared: they have holes
	Rounds  int    `json:"rounds"`   // how often it was mounted anew, empty
}

// Reads sums up the load.
type Reads struct {
	Count   int64         `json:"count"`
	Bytes   int64         `json:"bytes"`
	Errors  int64         `json:"errors"`  // all of them
	Excused int64         `json:"excused"` // of those, errors that a fault excuses
	P50     time.Duration `json:"p50_ns"`
	P90     time.Duration `json:"p90_ns"`
	P99     time.Duration `json:"p99_ns"`
	P999    time.Duration `json:"p999_ns"`
	Max     time.Duration `json:"max_ns"`
	Buckets []Bucket      `json:"buckets"`
}

// A Bucket counts the reads that took less than LE and no less than the bucket before, at most 6.25 % apart from 16 us on.
type Bucket struct {
	LE    time.Duration `json:"le_ns"`
	Count int64         `json:"count"`
}

// A TimelineReport has an entry for each stretch of Bin.
type TimelineReport struct {
	Bin   time.Duration   `json:"bin_ns"`
	Stall []time.Duration `json:"stall_ns"` // the longest that a read had waited by the end of the stretch, or by its own end in it
	Reads []int64         `json:"reads"`    // that ended in it
}

// A Fault is one fault as it was done.
type Fault struct {
	Number   int           `json:"number"` // from 1
	Kind     Kind          `json:"kind"`
	At       time.Duration `json:"at_ns"`
	Held     time.Duration `json:"held_ns"`     // how long it was held
	Recovery time.Duration `json:"recovery_ns"` // from its end until the daemon answered
	Pending  int           `json:"pending"`     // reads under way when it came
	Before   int           `json:"pid_before"`
	After    int           `json:"pid_after"`
	MaxStall time.Duration `json:"max_stall_ns"` // the longest read that it touched
	Violated Violated      `json:"violated"`
	Detail   string        `json:"detail,omitempty"`
	Failed   string        `json:"failed,omitempty"` // why it was not done after all, or what did not recover
}

// Violated counts violations.
type Violated struct {
	Wrong      int64 `json:"wrong"`      // I1: reads with a wrong byte, or too few
	Errors     int64 `json:"errors"`     // I1: errors that nothing excuses
	Unanswered int64 `json:"unanswered"` // I2: reads that never ended, daemons that never came back
	OverBound  int64 `json:"over_bound"` // stalls over the bound
}

// Sum is how many there are.
func (v Violated) Sum() int64 { return v.Wrong + v.Errors + v.Unanswered + v.OverBound }

func (v Violated) plus(o Violated) Violated {
	return Violated{v.Wrong + o.Wrong, v.Errors + o.Errors, v.Unanswered + o.Unanswered, v.OverBound + o.OverBound}
}

// A KindTotal sums up the faults of one kind.
type KindTotal struct {
	Kind        Kind          `json:"kind"`
	Count       int           `json:"count"`
	NotDone     string        `json:"not_done,omitempty"` // why there is none, or fewer than planned
	Violated    Violated      `json:"violated"`
	MaxStall    time.Duration `json:"max_stall_ns"`
	MaxRecovery time.Duration `json:"max_recovery_ns"`
}

// A Violation is a moment at which an invariant did not hold.
type Violation struct {
	At        time.Duration `json:"at_ns"`
	Invariant string        `json:"invariant"` // "I1", "I2", "bound"
	What      string        `json:"what"`
	Fault     int           `json:"fault"` // the number of the fault at work, 0: none
	Path      string        `json:"path,omitempty"`
	Off       int64         `json:"off"`
	Len       int           `json:"len"`
	Waited    time.Duration `json:"waited_ns"`
}

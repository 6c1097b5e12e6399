// Package kill kills the daemon everywhere, under readers that compare every byte, and says whether any reader noticed.
//
// It has tests only. Four drills, from the exact to the random:
//
//   - TestKillAtEveryPoint: at each crash point of the source, the 1st, 2nd and n-th time a process comes by it;
//   - TestKillDuringTheRecoveryOfAKill: pairs of a point, and a point of the recovery from it;
//   - TestKillAtSystemCalls: at the entry and the exit of the k-th system call (package killer);
//   - TestRandomKills: at any time.
//
// Each case has a keeper and a daemon of its own. What must hold is what package load calls O1 to O3, and after the case
// O4: what is on record, what the supervisor holds and what the kernel says agree, which `holdfast state check` finds out.
//
// The environment says what to run:
//
//	HOLDFAST_BIN_POINTS  a holdfast built with -tags crashpoints; built by the test where it is not set
//	HOLDFAST_BIN         the product's own build, for the drills that need no points; likewise
//	HOLDFAST_ENGINE      the engine, which then must work; otherwise the drills are skipped where no engine works
//	HOLDFAST_SEED        of everything random; printed with each failure
//	HOLDFAST_DRILL=full  all pairs and all system calls rather than a sample
//	HOLDFAST_BUDGET      time that a sampled drill may take
//	HOLDFAST_KILLS       how many random kills
//	HOLDFAST_FLOWS       only these flows (see flows), comma-separated, for the crash points
//	HOLDFAST_PART        2/3: every third case of the crash points, the second and on; with a seed, three machines run all of them
//	HOLDFAST_CASE        one case of a drill, as a failure prints it
//
// TestMutations shows that the drills notice: for each safety that holdfast has, a build without it is run through a drill that must
// fail (package mutant). It runs where HOLDFAST_DRILL is set.
package kill

package simkernel_test

import (
	"testing"

	"holdfast/fscache/simkernel"
)

// TestSchedulesMissRemovedSafeties takes one safety away from the daemon's process at a time. Each must be missed by a schedule soon: a
// suite that does not notice proves nothing.
func TestSchedulesMissRemovedSafeties(t *testing.T) {
	const cachefiles, old, fanotify = simkernel.Cachefiles, simkernel.CachefilesWithoutRestore, simkernel.Fanotify
	for _, c := range []struct {
		name string
		m    mutation
		in   []simkernel.Mode
		at   uint64 // schedules it may take
	}{
		{"NoInbox", noInbox, []simkernel.Mode{old, fanotify}, 100},
		{"NumbersNotOccupied", numbersNotOccupied, []simkernel.Mode{fanotify}, 1000},
		{"RestoreBeforeCopen", restoreBeforeCopen, []simkernel.Mode{cachefiles}, 20000},
		{"OldGoesOnReading", oldGoesOnReading, []simkernel.Mode{cachefiles, old, fanotify}, 200},
		{"AnswerBeforeWrite", answerBeforeWrite, []simkernel.Mode{cachefiles, old, fanotify}, 100},
		{"SlotFreedBeforeAnswer", slotBeforeAnswer, []simkernel.Mode{old, fanotify}, 20000},
		{"RecordsBelievedBeforeMessages", recordsBeforeMessages, []simkernel.Mode{fanotify}, 20000},
		{"OneRecordForSeveralClaims", oneRecordPerNumber, []simkernel.Mode{fanotify}, 20000},
		{"InboxRemovedBeforeItIsRecorded", inboxRemovedBeforeRecord, []simkernel.Mode{old, fanotify}, 1000},
		{"FinishedReportedAtTheFirstOfSeveralAnswers", finishedAtOnce, []simkernel.Mode{fanotify}, 5000},
		{"ReplayedOpenReleasedWhenItWasAnswered", replayedOpenReleased, []simkernel.Mode{cachefiles, old}, 20000},
	} {
		for name, mode := range modes {
			for _, in := range c.in {
				if in != mode {
					continue
				}
				t.Run(c.name+"/"+name, func(t *testing.T) {
					dirs := mountPoints(t)
					for seed := range c.at {
						if what, _ := runSeed(mode, c.m, dirs, seed, false); what != "" {
							t.Logf("%s: schedule %d: %s", t.Name(), seed, what)
							return
						}
					}
					t.Errorf("%d schedules noticed nothing", c.at)
				})
			}
		}
	}
}

package enginetest

import (
	"testing"

	"holdfast/fscache"
)

// rules are what every engine keeps. Each starts with an empty cache.
var rules = []struct {
	name string
	run  func(t *testing.T, h Harness)
}{
	{"ReaderWaitsUntilAnswered", readerWaitsUntilAnswered},
	{"ReadReturnsTheBytesWritten", readReturnsTheBytesWritten},
	{"RequestCoversTheRead", requestCoversTheRead},
	{"DeniedReaderGetsEIOAndTheNextReadAsksAgain", deniedReaderGetsEIO},
	{"EachRequestGoesToOneCallerOfNext", eachRequestGoesToOneCaller},
	{"SecondAnswerIsRefused", secondAnswerIsRefused},
	{"AnswersInAnyOrderReachTheirReaders", answersInAnyOrder},
	{"AnAnswerReachesItsOwnReaderOnly", answerReachesItsOwnReader},
	{"ConcurrentReadersOfOneRange", concurrentReadersOfOneRange},
	{"SlowObjectDelaysItsOwnReadersOnly", slowObjectDelaysItsOwnReaders},
	{"KilledReaderDisturbsNobody", killedReaderDisturbsNobody},
	{"CloseUnblocksNext", closeUnblocksNext},
	{"FrozenEngineAnswersButReadsNoMore", frozenEngineAnswers},
	{"ClosedEngineRefusesEverything", closedEngineRefuses},
	{"UnansweredRequestSurvivesTheProcess", unansweredRequestSurvives(func(*fscache.Inherited) {})},
	{"UnansweredRequestSurvivesByItsMessage", unansweredRequestSurvives(func(left *fscache.Inherited) { left.Pending = nil })},
	{"UnansweredRequestSurvivesByItsRecord", unansweredRequestSurvives(func(left *fscache.Inherited) { left.Messages = nil })},
	{"SuccessorOfALivingEngineLosesNothing", upgradeLosesNothing},
	{"AddAgainChangesNothing", addAgainChangesNothing},
	{"AddWithAnotherSizeFails", addWithAnotherSizeFails},
	{"AddRefusesBadNamesAndSizes", addRefusesBadNames},
	{"UnknownObjectIsRefused", unknownObjectIsRefused},
	{"WriteOutsideOrUnalignedIsRefused", badWriteIsRefused},
	{"PresentListsWhatWasWritten", presentListsWhatWasWritten},
	{"ReadAtReturnsWhatWasWritten", readAtReturnsWhatWasWritten},
	{"ShareChangesNoByte", shareChangesNoByte},
	{"DropMakesAHole", dropMakesAHole},
	{"WrittenDataOutlivesTheEngine", writtenDataOutlivesTheEngine},
	{"CompletedObjectRaisesNoRequest", completedObjectRaisesNoRequest},
	{"RemoveOfAUsedObjectFails", removeOfUsedObjectFails},
	{"CullDeletesWhatNobodyUses", cullDeletesWhatNobodyUses},
	{"CullOfWhatAnotherProcessMountedFails", cullOfWhatAnotherProcessMounted},
	{"CullRefusesBadNames", cullRefusesBadNames},
	{"UnmountWhileBusyFails", unmountWhileBusyFails},
	{"MountErrorsNameTheDirectory", mountErrorsNameTheDirectory},
	{"DomainsShareNothing", domainsShareNothing},
	{"TwoMountsShareABlob", twoMountsShareABlob},
}

// Run checks an engine against every rule. newHarness returns one with an empty cache each time.
func Run(t *testing.T, newHarness func(t *testing.T) Harness) {
	for _, rule := range rules {
		t.Run(rule.name, func(t *testing.T) { rule.run(t, newHarness(t)) })
	}
}

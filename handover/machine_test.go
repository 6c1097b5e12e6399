package handover

import (
	"fmt"
	"slices"
	"testing"
)

// giveTable is PROTOCOL.md's, for what is not a failure. Everything else is, in every state.
var giveTable = map[giveState]map[giveEvent]string{
	giveGreeting:  {giveHello: "1 [0]"},
	givePreparing: {giveReady: "2 [1]"},
	giveFreezing:  {giveStopped: "3 [2]"},
	giveFrozen:    {giveTaken: "4 [3]"},
	giveGranting:  {giveGranted: "5 []"},
	giveDraining:  {giveDone: "5 [4]", giveAllDone: "7 [5]", giveTimeOver: "7 []"},
	giveOrphaned:  {giveAllDone: "7 []", giveTimeOver: "7 []"},
}

// giveFailure is what a failure does in each state.
var giveFailure = map[giveState]string{
	giveGreeting: "7 [6 7]", givePreparing: "7 [6 7]", giveFreezing: "7 [6 7]", giveFrozen: "7 [6 7 8]", giveGranting: "7 [6 7 8]",
	giveDraining: "6 []", giveOrphaned: "6 []", giveEnded: "7 []",
}

func TestGiveTransitionsAreThoseOfTheProtocol(t *testing.T) {
	for s := range giveStates {
		for e := range giveEvents {
			want, ok := giveTable[s][e]
			if !ok {
				want = giveFailure[s]
			}
			next, actions := giveNext(s, e)
			if got := fmt.Sprint(uint8(next), " ", numbers(actions)); got != want {
				t.Errorf("state %d, event %d: %s, want %s", s, e, got, want)
			}
		}
	}
}

var takeTable = map[takeState]map[takeEvent]string{
	takeGreeting:  {takeHello: "1 []"},
	takeReceiving: {takeRecord: "1 []", takePrepared: "2 [0]"},
	takeOpening:   {takeOpened: "3 [1]"},
	takeReady:     {takeRecord: "3 [2]", takeCommit: "4 [3]"},
	takeTaking:    {takeTook: "5 [4]"},
	takeWaiting:   {takeGo: "6 [5]"},
	takeDraining:  {takeRecord: "6 [6]", takeDrained: "8 [8]", takeStopped: "8 []"},
	takeBurying:   {takeTimeOver: "7 [7]", takeDead: "8 [9]", takeStopped: "8 []"},
}

var takeFailure = map[takeState]string{
	takeGreeting: "8 [10]", takeReceiving: "8 [10]", takeOpening: "8 [10]", takeReady: "8 [10]", takeTaking: "8 [10]", takeWaiting: "8 [10]",
	takeDraining: "7 []", takeBurying: "7 []", takeEnded: "8 []",
}

func TestTakeTransitionsAreThoseOfTheProtocol(t *testing.T) {
	for s := range takeStates {
		for e := range takeEvents {
			want, ok := takeTable[s][e]
			if !ok {
				want = takeFailure[s]
			}
			next, actions := takeNext(s, e)
			if got := fmt.Sprint(uint8(next), " ", numbers(actions)); got != want {
				t.Errorf("state %d, event %d: %s, want %s", s, e, got, want)
			}
		}
	}
}

func numbers[A ~uint8](actions []A) []int {
	n := make([]int, len(actions))
	for i, a := range actions {
		n[i] = int(a)
	}
	return n
}

// A world is both machines, what is between them, and who reads. Each action is a step of its own, and each process may die, or lose
// patience, before any.
type world struct {
	g                giveState
	k                takeState
	gTodo            []giveAction
	kTodo            []takeAction
	toG, toK         []frameType
	gDead, kDead     bool
	gReads, kReads   bool
	gInFlight, kHeir bool // the predecessor may still answer; the successor answers what the predecessor had
	granted          bool // go was queued
}

func (w world) copy() world {
	w.gTodo, w.kTodo, w.toG, w.toK = slices.Clone(w.gTodo), slices.Clone(w.kTodo), slices.Clone(w.toG), slices.Clone(w.toK)
	return w
}

func (w *world) give(e giveEvent) {
	var actions []giveAction
	w.g, actions = giveNext(w.g, e)
	w.gTodo = append(w.gTodo, actions...)
}

func (w *world) take(e takeEvent) {
	var actions []takeAction
	w.k, actions = takeNext(w.k, e)
	w.kTodo = append(w.kTodo, actions...)
}

// giveAct does the predecessor's next action; send says whether what it sends is queued.
func (w *world) giveAct(send bool) {
	a := w.gTodo[0]
	w.gTodo = w.gTodo[1:]
	queue := func(t frameType) {
		if send {
			w.toK = append(w.toK, t)
		} else if a != giveAbort {
			w.give(giveFailed)
		}
	}
	switch a {
	case giveSnapshot:
		queue(framePrepared)
	case giveFreeze:
		if send {
			w.gReads = false
			w.give(giveStopped)
		} else { // refused, and rolled back
			w.give(giveFailed)
		}
	case giveCommit:
		queue(frameCommit)
	case giveGo:
		queue(frameGo)
		if send {
			w.granted = true
			w.give(giveGranted)
		}
	case giveReport:
		queue(frameRecord)
	case giveDrained:
		w.gInFlight = false
		queue(frameDrained)
	case giveAbort:
		queue(frameAbort)
	case giveKill:
		w.kDead, w.kReads, w.kHeir = true, false, false
	case giveResume:
		w.gReads = true
	}
}

func (w *world) takeAct(ok bool) {
	a := w.kTodo[0]
	w.kTodo = w.kTodo[1:]
	outcome := func(e takeEvent) {
		if !ok {
			e = takeFailed
		}
		w.take(e)
	}
	queue := func(t frameType) {
		if ok {
			w.toG = append(w.toG, t)
		} else if a != takeAbort {
			w.take(takeFailed)
		}
	}
	switch a {
	case takeOpen:
		outcome(takeOpened)
	case takeReport:
		queue(frameReady)
	case takeAccept:
		outcome(takeTook)
	case takeTaken:
		queue(frameTaken)
	case takeRead:
		w.kReads = true
	case takeKill:
		w.gDead, w.gReads, w.gInFlight = true, false, false
	case takeFinish, takeInherit:
		w.kHeir = true
	case takeAbort:
		queue(frameAbort)
	}
}

var (
	toGive = map[frameType]giveEvent{frameHello: giveHello, frameReady: giveReady, frameTaken: giveTaken, frameAbort: giveFailed}
	toTake = map[frameType]takeEvent{frameHello: takeHello, framePrepared: takePrepared, frameCommit: takeCommit, frameGo: takeGo, frameRecord: takeRecord,
		frameDrained: takeDrained, frameAbort: takeFailed}
)

// moves are all worlds that can follow.
func (w world) moves() (next []world) {
	try := func(f func(*world)) {
		v := w.copy()
		f(&v)
		next = append(next, v)
	}
	gEnded := w.gDead || w.g == giveEnded && len(w.gTodo) == 0
	kEnded := w.kDead || w.k == takeEnded && len(w.kTodo) == 0
	if !w.gDead {
		try(func(v *world) { v.gDead, v.gReads, v.gInFlight = true, false, false })
		switch {
		case len(w.gTodo) > 0:
			if !w.kDead { // sending to the dead fails
				try(func(v *world) { v.giveAct(true) })
			}
			try(func(v *world) { v.giveAct(false) })
		case !gEnded:
			try(func(v *world) { v.give(giveTimeOver) })
			if len(w.toG) > 0 {
				try(func(v *world) { v.give(toGive[v.toG[0]]); v.toG = v.toG[1:] })
			} else if kEnded {
				try(func(v *world) { v.give(giveFailed) })
			}
			if w.g == giveDraining || w.g == giveOrphaned {
				if len(w.toK) < 3 {
					try(func(v *world) { v.give(giveDone) })
				}
				try(func(v *world) { v.give(giveAllDone) })
			}
		}
	}
	if !w.kDead {
		try(func(v *world) { v.kDead, v.kReads, v.kHeir = true, false, false })
		switch {
		case len(w.kTodo) > 0:
			if !w.gDead || w.kTodo[0] != takeReport && w.kTodo[0] != takeTaken {
				try(func(v *world) { v.takeAct(true) })
			}
			try(func(v *world) { v.takeAct(false) })
		case !kEnded:
			try(func(v *world) { v.take(takeTimeOver) })
			try(func(v *world) { v.take(takeStopped) })
			switch {
			case w.k == takeBurying:
				if w.gDead {
					try(func(v *world) { v.take(takeDead) })
				}
			case len(w.toK) > 0:
				try(func(v *world) { v.take(toTake[v.toK[0]]); v.toK = v.toK[1:] })
			case gEnded:
				try(func(v *world) { v.take(takeFailed) })
			}
		}
	}
	return next
}

func (w world) broken() string {
	switch {
	case w.gReads && w.kReads:
		return "I6: both read"
	case w.kHeir && w.gInFlight:
		return "I2: both answer what the predecessor had in flight"
	case w.g == giveEnded && len(w.gTodo) == 0 && !w.gDead && !w.granted && !w.gReads:
		return "the predecessor lives, did not hand over, and does not read"
	case w.granted && w.gReads:
		return "the predecessor reads after go"
	}
	return ""
}

// Both machines together, in every order of steps, deaths, timeouts and failed sends: some ten thousand worlds.
func TestOneProcessReadsWhoeverDiesWhenever(t *testing.T) {
	start := world{gReads: true, gInFlight: true, toG: []frameType{frameHello}, toK: []frameType{frameHello}}
	key := func(w world) string { return fmt.Sprintf("%+v", w) }
	came := map[string]string{key(start): ""}
	todo := []world{start}
	good, inherited := 0, 0
	for len(todo) > 0 {
		w := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if why := w.broken(); why != "" {
			for k := key(w); k != ""; k = came[k] {
				t.Log(k)
			}
			t.Fatalf("%s; how it came about is above, from last to first", why)
		}
		if w.kReads && w.kHeir {
			good++
			if w.gDead {
				inherited++
			}
		}
		for _, n := range w.moves() {
			if _, ok := came[key(n)]; !ok {
				came[key(n)] = key(w)
				todo = append(todo, n)
			}
		}
	}
	t.Logf("%d worlds; in %d the successor has everything, in %d of these from a dead predecessor", len(came), good, inherited)
	if good == 0 || inherited == 0 {
		t.Fatal("an upgrade never succeeds")
	}
}

package raft

import (
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"
)

// simDice is a source of dice (splitmix64). Before each decision the simulator
// sets its state to a hash of the seed, of what is decided, of whom it concerns
// and of how often that was decided before. So the dice of one decision do not
// depend on those of others: a run in which one fault is left out goes on with
// the same delays, the same elections and the same other faults, except for
// what follows from the fault. That is what makes a schedule of faults a list
// from which some can be taken out.
type simDice struct{ state uint64 }

func (d *simDice) Uint64() uint64 {
	d.state += 0x9e3779b97f4a7c15
	return spread(d.state)
}

// spread is the finalizer of splitmix64.
func spread(x uint64) uint64 {
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// simDecision is what the dice decide. The faults come first.
type simDecision uint8

const (
	faultNemesis simDecision = iota
	faultDrop
	faultBreak
	faultDuplicate
	faultDelay
	faultOldReply
	faultCrash
	faultFlushSlow
	faultFlushFail
	faultReadSlow
	faultReadFail
	faultPower
	faultPowerRecovery
	faultSnapshotFail
	faultSnapshotSlow
	faultInstallLate
	faultKinds

	turnSetup
	turnMessage
	turnFlush
	turnRead
	turnApply
	turnBoot
	turnHeal
	turnEvent    // plus the kind of the event
	simDecisions = turnEvent + simDecision(len(simEventNames))
)

var simFaultNames = [faultKinds]string{"nemesis", "drop", "break", "duplicate", "delay", "old-reply", "crash", "flush-slow", "flush-fail", "read-slow", "read-fail", "power", "power-recovery", "snapshot-fail", "snapshot-slow", "install-late"}

// simFault names one fault of a run: the n-th time that a fault of this kind
// could have struck this node, or this path (from*nodes + to).
type simFault struct {
	kind simDecision
	who  uint8
	n    uint32
}

func (f simFault) String() string { return fmt.Sprintf("%s:%d:%d", simFaultNames[f.kind], f.who, f.n) }

// simStrike is a fault that struck.
type simStrike struct {
	simFault
	at   time.Duration
	what string
}

// describe says when a fault struck, its name, and what it was, where there are
// so many nodes.
func (d simStrike) describe(nodes int) string {
	what := d.what
	switch d.kind {
	case faultNemesis, faultCrash:
	case faultDrop, faultBreak, faultDuplicate, faultDelay, faultOldReply:
		what = fmt.Sprintf("a message from %d to %d", int(d.who)/nodes, int(d.who)%nodes)
	default:
		what = fmt.Sprintf("on node %d", d.who)
	}
	return fmt.Sprintf("%12v %-20v %s", d.at, d.simFault, what)
}

// count returns how often a decision was made before, and counts this one.
func (s *sim) count(k simDecision, who int) uint32 {
	for len(s.counts[k]) <= who {
		s.counts[k] = append(s.counts[k], 0)
	}
	n := s.counts[k][who]
	s.counts[k][who]++
	return n
}

func (s *sim) hashOf(k simDecision, who int, n uint32) uint64 {
	return spread(spread(s.seed+0x9e3779b97f4a7c15) ^ (uint64(k)<<48 | uint64(who)<<32 | uint64(n)))
}

// turn gives the next decision of a kind about one node or path dice of its
// own, and returns what back needs to go on with those of the decision around it.
func (s *sim) turn(k simDecision, who int) (before uint64) {
	before = s.dice.state
	s.dice.state = s.hashOf(k, who, s.count(k, who))
	return before
}

func (s *sim) back(before uint64) { s.dice.state = before }

// strikes decides whether a fault strikes, which happens in rounds of faults
// only, with probability p. Every fault there is comes through here.
func (s *sim) strikes(k simDecision, who int, p float64) bool {
	if p <= 0 || !s.faulty {
		return false
	}
	f := simFault{k, uint8(who), s.count(k, who)}
	if p < 1 && float64(s.hashOf(k, who, f.n)>>11)/(1<<53) >= p {
		return false
	}
	if s.plan.only != nil && !s.plan.only[f] {
		return false
	}
	s.struck = append(s.struck, simStrike{simFault: f, at: s.now})
	return true
}

const noFaults = "none"

func formatFaults(struck []simStrike) string {
	if len(struck) == 0 {
		return noFaults
	}
	var names []string
	for _, f := range struck {
		names = append(names, f.simFault.String())
	}
	return strings.Join(names, ",")
}

// parseFaults is the inverse of formatFaults.
func parseFaults(list string) (map[simFault]bool, error) {
	only := map[simFault]bool{}
	if list == noFaults {
		return only, nil
	}
next:
	for name := range strings.SplitSeq(list, ",") {
		kind, rest, _ := strings.Cut(name, ":")
		for k, known := range simFaultNames {
			if kind != known {
				continue
			}
			f := simFault{kind: simDecision(k)}
			if _, err := fmt.Sscanf(rest, "%d:%d", &f.who, &f.n); err != nil || f.String() != name {
				break
			}
			only[f] = true
			continue next
		}
		return nil, fmt.Errorf("%q is no fault: want kind:who:count, with a kind of %v", name, simFaultNames)
	}
	return only, nil
}

func faultSet(struck []simStrike) map[simFault]bool {
	only := make(map[simFault]bool, len(struck))
	for _, f := range struck {
		only[f.simFault] = true
	}
	return only
}

var digits = regexp.MustCompile(`[0-9]+`)

// shrinker looks for a smaller schedule of faults with which a seed still fails
// the same check.
type shrinker struct {
	seed     uint64
	plan     simPlan
	class    string
	deadline time.Time
	best     simResult
	runs     int
}

// shrink takes faults out of a failed run for as long as d, and returns the run
// that fails with the fewest: all of one kind first, then shares of what is
// left, each half as large as those before. The wall clock limits how far it
// gets; nothing but the text of a failure depends on it.
func shrink(seed uint64, plan simPlan, res simResult, d time.Duration) *shrinker {
	h := &shrinker{seed: seed, plan: plan, class: res.class, deadline: time.Now().Add(d), best: res}
	for k := range faultKinds {
		var without []simStrike
		for _, f := range h.best.struck {
			if f.kind != k {
				without = append(without, f)
			}
		}
		h.try(without)
	}
	for size := (len(h.best.struck) + 1) / 2; size > 0 && h.inTime(); {
		smaller := false
		for i := 0; i < len(h.best.struck) && h.inTime(); {
			struck := h.best.struck
			without := append(append([]simStrike(nil), struck[:i]...), struck[min(i+size, len(struck)):]...)
			if h.try(without) {
				smaller = true
			} else {
				i += size
			}
		}
		if size > 1 || !smaller { // once more with the smallest, if that helped
			size /= 2
		}
	}
	return h
}

func (h *shrinker) inTime() bool { return time.Now().Before(h.deadline) }

// try runs the seed with these faults only. If it fails in the same way, what
// struck meanwhile becomes the best schedule: it is never longer.
func (h *shrinker) try(faults []simStrike) bool {
	if len(faults) == len(h.best.struck) || !h.inTime() {
		return false
	}
	h.runs++
	plan := h.plan
	plan.only = faultSet(faults)
	plan.until = h.best.simulated + 2*h.best.timeout // what has not failed by then is not likely to
	res := runSim(h.seed, plan)
	if res.err == nil || res.class != h.class {
		return false
	}
	h.best = res
	return true
}

// replayCommand is what runs a seed once more, with a list of faults or with
// all of them.
func replayCommand(seed uint64, plan simPlan, faults string) string {
	c := fmt.Sprintf("go test -run '%s$' -sim.seed=%d", plan.test, seed)
	if plan.disk != "" {
		c += " -sim.disk=" + plan.disk
	}
	if faults != "" {
		c += " -sim.faults=" + faults
	}
	return c + " -v ."
}

// replaySim runs the one seed of -sim.seed with the faults of -sim.faults.
func replaySim(t *testing.T, plan simPlan) {
	t.Helper()
	if *simFaults != "" {
		var err error
		if plan.only, err = parseFaults(*simFaults); err != nil {
			t.Fatal(err)
		}
	}
	started := time.Now()
	res := runSim(*simSeed, plan)
	reportSim(t, *simSeed, plan, res)
	t.Logf("seed %d: hash %016x, %d steps in %v, %v simulated, %d faults, %d committed, %d elections, %d answered, %d unknown, healed in %.2f timeouts",
		*simSeed, res.hash, res.steps, time.Since(started), res.simulated, len(res.struck), res.committed, res.elections, res.ok, res.lost, res.healTimes)
}

// reportSim fails the test if the run failed: with the smallest schedule of
// faults that was found, what happened under it, and the commands that replay
// it and the whole seed.
func reportSim(t *testing.T, seed uint64, plan simPlan, res simResult) {
	t.Helper()
	if res.err != nil {
		t.Error(describeFailure(seed, plan, res))
	}
}

func describeFailure(seed uint64, plan simPlan, res simResult) string {
	h := shrink(seed, plan, res, *simShrink)
	var b strings.Builder
	fmt.Fprintf(&b, "seed %d: %v\n", seed, res.err)
	fmt.Fprintf(&b, "%d of its %d faults are enough (found in %d runs): %v\n", len(h.best.struck), len(res.struck), h.runs, h.best.err)
	for _, f := range h.best.struck {
		fmt.Fprintln(&b, f.describe(res.nodes))
	}
	fmt.Fprintf(&b, "the last events with these:\n%s", h.best.tail)
	fmt.Fprintf(&b, "replay with these faults only: %s\n", replayCommand(seed, plan, formatFaults(h.best.struck)))
	fmt.Fprintf(&b, "replay the whole seed: %s", replayCommand(seed, plan, ""))
	return b.String()
}

// TestSimShrinks: of all the faults of a run, those are found that an invariant
// needs to break, and their list replays the failure. The invariant is made up:
// it breaks when a node loses its power while the network is cut.
func TestSimShrinks(t *testing.T) {
	// A crash at a boundary is named by how many events came before it, so that
	// it is another one where anything else is left out; here is none.
	plan := simPlan{tune: func(w *simSwarm) { w.spares, w.boundaryP, w.rounds, w.lease = 0, 0, 1, 0 }, check: func(s *sim) {
		cut := false
		for i := range s.links {
			cut = cut || s.links[i].cut
		}
		for _, n := range s.nodes {
			if cut && n.core == nil && s.faulty {
				s.fail("node %d is down while the network is cut", n.i)
			}
		}
	}}
	var tried, faults int
	for seed := uint64(1); seed <= 40 && tried < seedCount(3); seed++ {
		res := runSim(seed, plan)
		if res.err == nil || len(res.struck) < 20 {
			continue
		}
		tried++
		faults += len(res.struck)
		h := shrink(seed, plan, res, time.Hour) // as far as it goes, on any machine
		// At least a cut and a crash. A crash may have an earlier fault for its
		// cause, such as a disk that became full, and none of the list can go alone.
		if n := len(h.best.struck); n < 2 || n > 5 {
			t.Errorf("seed %d: %d of %d faults are left: %s", seed, n, len(res.struck), formatFaults(h.best.struck))
		}
		for i := range h.best.struck {
			fewer := plan
			fewer.until = h.best.simulated + 20*h.best.timeout // as far as shrink looked
			fewer.only = faultSet(h.best.struck)
			delete(fewer.only, h.best.struck[i].simFault)
			if r := runSim(seed, fewer); r.err != nil {
				t.Errorf("seed %d: %v is not needed", seed, h.best.struck[i].simFault)
			}
		}
		replay := plan
		var err error
		if replay.only, err = parseFaults(formatFaults(h.best.struck)); err != nil {
			t.Fatal(err)
		}
		if r := runSim(seed, replay); r.err == nil || r.err.Error() != h.best.err.Error() || r.hash != h.best.hash {
			t.Errorf("seed %d: its smallest schedule replays as %v, found was %v", seed, r.err, h.best.err)
		}
		t.Logf("seed %d: %d of %d faults after %d runs: %s", seed, len(h.best.struck), len(res.struck), h.runs, formatFaults(h.best.struck))
	}
	if want := seedCount(3); tried < want {
		t.Errorf("the made-up invariant broke in %d seeds with 20 faults and more, want %d", tried, want)
	}
}

// TestSimScheduleIsComplete: a run's own list of faults repeats it exactly, and
// an empty one leaves nothing that goes wrong before the first round ends.
func TestSimScheduleIsComplete(t *testing.T) {
	t.Parallel()
	for k := range uint64(seedCount(6)) {
		seed := k + 3 // 2 is the longest of the first ones
		res := runSim(seed, simPlan{})
		again := runSim(seed, simPlan{only: faultSet(res.struck)})
		if again.hash != res.hash {
			t.Errorf("seed %d: hash %016x, and %016x with the %d faults that it had", seed, res.hash, again.hash, len(res.struck))
		}
		calm := simPlan{only: map[simFault]bool{}, check: func(s *sim) {
			for _, n := range s.nodes {
				if s.round == 1 && s.faulty && (n.core == nil || n.run != 1) {
					s.fail("node %d stopped, and no fault struck", n.i)
				}
			}
		}}
		res = runSim(seed, calm)
		reportSim(t, seed, calm, res)
		if len(res.struck) != 0 {
			t.Errorf("seed %d: %s struck", seed, formatFaults(res.struck))
		}
	}
	for _, bad := range []string{"", "drop", "drop:1", "drop:1:2:3", "melt:1:2", "drop:999:1", "drop:1:2,"} {
		if only, err := parseFaults(bad); err == nil {
			t.Errorf("%q is taken for %v", bad, only)
		}
	}
}

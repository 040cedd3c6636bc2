package raft

import (
	"math/rand/v2"
	"strings"
	"testing"
	"time"
)

// Leases in the simulator: in some seeds leaders ask for promises, and clients
// read by them. There clocks differ in rate by as much as the leases allow and do
// not jump, machines sleep, and whoever campaigns at once does it because its
// leader said so. While a leader believes in a lease nobody leads a later term
// (invariant 22), and what is read by it is the newest (21). Every promise that a
// leader was told of is kept to its end, however often the server starts (23).

// drawLeases has dice of its own, so that the other seeds stay what they are.
func (s *sim) drawLeases() {
	if dice := rand.New(rand.NewPCG(s.seed, 0x1ea5e)); dice.Float64() < 0.3 {
		s.swarm.setLeases(s.seed)
	}
}

// setLeases lets leaders ask for promises that are longer than an election
// timeout in some seeds: that must not matter.
func (w *simSwarm) setLeases(seed uint64) {
	dice := rand.New(rand.NewPCG(seed, 0x1ea5f))
	w.lease = time.Duration(float64(w.timeout) * (0.4 + 1.1*dice.Float64()))
	w.driftPercent = []int{1, 5, 20, 50}[dice.IntN(4)]
	w.clockSpread = float64(w.driftPercent) / 100
	w.leasesChange = dice.IntN(2) == 0
}

// drawRate draws a rate of a clock, often one of the extremes.
func (s *sim) drawRate() float64 {
	switch s.rng.IntN(3) {
	case 0:
		return 1
	case 1:
		return 1 + s.swarm.clockSpread
	}
	return 1 + s.swarm.clockSpread*s.rng.Float64()
}

// setClock changes the rate of a node's clock, and lets it jump. Its timer is to
// be set anew.
func (s *sim) setClock(n *simNode, jump time.Duration, rate float64) {
	s.accountSleep(n)
	n.clockBase, n.clockAt, n.clockRate = s.localNow(n).Sub(simEpoch)+jump, s.now, rate
}

// fallAsleep stops a node's clock until wake: the machine is suspended.
func (s *sim) fallAsleep(n *simNode) {
	if !n.asleep {
		n.asleep, n.sleepsSince = true, s.now
	}
}

func (s *sim) wake(n *simNode) {
	s.accountSleep(n)
	n.asleep = false
}

func (s *sim) accountSleep(n *simNode) {
	if n.asleep {
		n.sleptFor += s.sleepUnderWay(n)
		n.clockBase, n.clockAt = s.localNow(n).Sub(simEpoch), s.now
		n.sleepsSince = s.now
	}
}

func (s *sim) sleepUnderWay(n *simNode) time.Duration {
	if !n.asleep {
		return 0
	}
	return time.Duration(float64(s.now-n.sleepsSince) * n.clockRate)
}

// setTime gives a node's core the time, as its clocks have it.
func (s *sim) setTime(n *simNode) {
	d := n.sleptFor + s.sleepUnderWay(n)
	n.core.now, n.core.slept = s.localNow(n), sleep{d, d}
}

// promises takes note of a promise that a reply tells of.
func (s *sim) promises(n *simNode, call *simCall) {
	if end := call.heard.Add(call.append.Lease); end.After(n.promised) {
		n.promised = end
	}
	s.keepsPromises(n, n.disk.hard.LeasePromise)
}

// keepsPromises checks that a node that starts now, with the given length on its
// disk, keeps what it has promised. It may have been saved as a shorter one since
// (23).
func (s *sim) keepsPromises(n *simNode, saved time.Duration) {
	if left := n.promised.Sub(s.localNow(n)); left > saved {
		s.fail("23 node %d has promised for %v more, its disk has %v", n.i, left, saved)
	}
	if s.swarm.lease > 0 && saved < n.seenSaved {
		s.reads.shortened++
	}
	n.seenSaved = saved
}

// changeLease gives a node that starts another length of leases, in some seeds.
func (s *sim) changeLease(n *simNode) {
	if l := &n.limits; l.leasePromise > 0 && s.swarm.leasesChange && s.chance(0.5) {
		l.leasePromise = time.Duration(float64(s.swarm.lease) * (0.1 + 0.9*s.rng.Float64()))
		l.lease = leaseWithin(l.leasePromise, s.swarm.driftPercent)
	}
}

// checkLeases: nobody leads a later term than one whose leader believes in a
// lease (22). So no two leases overlap.
func (s *sim) checkLeases() {
	newest := s.highestLeader()
	if s.swarm.lease == 0 || newest == nil {
		return
	}
	for _, n := range s.nodes {
		if n == newest || n.core == nil || n.core.role != Leader || n.core.currentTerm >= newest.core.currentTerm {
			continue
		}
		if s.setTime(n); n.core.holdsLease() {
			s.fail("22 node %d believes in a lease in term %d, and node %d leads term %d", n.i, n.core.currentTerm, newest.i, newest.core.currentTerm)
		}
	}
}

// campaignByLease is campaign where there are leases: the leader says so, or the
// node's timer was short, or the power failed at all nodes but the leader.
func (s *sim) campaignByLease(n *simNode) {
	l := s.highestLeader()
	switch p := s.rng.Float64(); {
	case p < 0.4 && l != nil && l.pausedUntil <= s.now:
		s.note(l.i, "shall hand leadership over")
		s.transfer(l)
	case p < 0.6 && l != nil:
		s.restartFollowers(l)
	default:
		s.shortTimer(n)
	}
}

func (s *sim) shortTimer(n *simNode) {
	if n.core == nil || n.core.role == Leader || n.core.role == Dead || n.pausedUntil > s.now || !s.faulty {
		return
	}
	s.note(n.i, "its election timer was short")
	s.begin(n).startCampaign()
	s.end(n)
}

func (s *sim) restartFollowers(l *simNode) {
	cut := s.chance(0.5)
	s.note(l.i, "power fails at all others; is it cut off: %v", cut)
	if cut {
		s.cutWhere(func(a, b int) bool { return a == l.i || b == l.i })
	}
	for _, n := range s.nodes {
		if n != l && n.core != nil {
			s.crash(n)
			s.restartAfter(n, s.someTimeouts(0.001, 0.02))
		}
	}
	n := s.nodes[s.rng.IntN(len(s.nodes))]
	s.push(simEvent{at: s.now + s.someTimeouts(0.03, 0.5), kind: evThen, node: n.i, then: func() { s.shortTimer(n) }})
}

// leaseTune makes the conditions under which leases go wrong, if they do: in some
// seeds everything at once, in others leaders that stay for a while.
func leaseTune(w *simSwarm) {
	if w.nodes < 3 {
		w.nodes, w.voters = 3, 3
	}
	seed := uint64(w.timeout) + uint64(w.delayMean)
	w.setLeases(seed)
	w.clientEvery = min(w.clientEvery, w.timeout/10)
	w.tailP, w.oldP = 0.1, 0.1
	if seed%3 == 0 {
		w.nemeses = append(w.nemeses, nemClock, nemPause, nemPause, nemIsolateLeader, nemCrash, nemCampaign, nemCampaignMore, nemOneWay)
		return
	}
	w.nemeses = []int{nemCampaign, nemCampaignMore, nemClock, nemPause, nemOneWay}
	w.nemesisEvery = max(w.nemesisEvery, w.timeout)
	w.tailP, w.oldP, w.boundaryP, w.flushFailP, w.breakP, w.losses = 0.1, 0.3, 0, 0, 0, 0
}

// TestSimLeases: leases in every seed.
func TestSimLeases(t *testing.T) {
	plan := simPlan{test: "TestSimLeases", tune: leaseTune}
	if *simSeed != 0 {
		replaySim(t, plan)
		return
	}
	var got simReads
	missing := func() bool {
		return got.byLease == 0 || got.allowed == got.byLease || got.withheld == 0 || got.sleeps == 0 || got.shortened == 0 || got.refused == 0
	}
	runSeeds(t, seedsFrom(1, plan, untilSeen(30, missing)), func(_ uint64, res simResult) { got.add(res.reads) })
	t.Logf("%+v", got)
	if missing() {
		t.Errorf("something did not happen: %+v", got)
	}
}

// TestSimLeasesBeyondBound: where clocks differ by more than the leases allow, a
// lease does go on while another node leads. So the check above can fail, and the
// bound means something.
func TestSimLeasesBeyondBound(t *testing.T) {
	t.Parallel()
	plan := simPlan{tune: func(w *simSwarm) {
		leaseTune(w)
		w.driftPercent, w.clockSpread = 1, 3
	}}
	for seed := uint64(1); seed <= 100; seed++ {
		res := runSim(seed, plan)
		if res.err == nil {
			continue
		}
		if !strings.HasPrefix(res.class, "22") && !strings.HasPrefix(res.class, "21") {
			t.Fatalf("seed %d: %v", seed, res.err)
		}
		t.Logf("seed %d: %v", seed, res.err)
		return
	}
	t.Error("clocks that differ by three times broke no lease in 100 seeds")
}

package raft

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// withLeases makes c ask for promises of 550 ms, of which it counts on 500.
func withLeases(c *core) *core {
	c.limits.leasePromise, c.limits.lease = 550*time.Millisecond, leaseWithin(550*time.Millisecond, 10)
	return c
}

// leaseLeader returns a leader of n voters that has committed its no-op and asks
// for promises.
func leaseLeader(t *testing.T, n int) *core {
	t.Helper()
	return withLeases(readLeader(t, n, false))
}

// heartbeats sends a round of heartbeats, by member.
func heartbeats(c *core) map[memberID]*appendArgs {
	sent := map[memberID]*appendArgs{}
	c.heartbeat()
	for _, m := range c.finish().msgs {
		if m.append != nil && m.append.Heartbeat {
			sent[m.to] = m.append
		}
	}
	return sent
}

func promised(c *core, from memberID, a *appendArgs) {
	c.onAppendReply(from, a, &appendReply{Term: c.currentTerm, Success: true, Promised: true})
	c.finish()
}

// leaseAnswers tells whether a read that a lease will do for is answered at once.
func leaseAnswers(t *testing.T, c *core) bool {
	t.Helper()
	c.read(1, true, "r")
	out := c.finish()
	switch {
	case len(out.answers) == 0 || !out.answers[0].ok:
		return false
	case len(out.answers) != 1 || out.answers[0].index != c.commitIndex:
		t.Fatalf("answers are %+v, want one of entry %d", out.answers, c.commitIndex)
	}
	return true
}

// A lease is counted from when the heartbeat was made, not from its answer, and
// is shorter than what was promised by the drift of clocks (thesis 6.4.1).
func TestLeaseCountsFromSending(t *testing.T) {
	c := leaseLeader(t, 3)
	if leaseAnswers(t, c) {
		t.Fatal("a lease without a promise")
	}
	began := c.now
	a := heartbeats(c)[2]
	if a.Lease != 550*time.Millisecond {
		t.Fatalf("the heartbeat asks for %v", a.Lease)
	}
	c.now = began.Add(400 * time.Millisecond)
	promised(c, 2, a)
	if !leaseAnswers(t, c) {
		t.Fatal("no lease after a majority promised")
	}
	c.now = began.Add(500*time.Millisecond - 1)
	if !leaseAnswers(t, c) {
		t.Fatal("the lease ended early")
	}
	c.now = began.Add(500 * time.Millisecond)
	if leaseAnswers(t, c) {
		t.Fatal("the lease goes on where the follower's promise may have ended")
	}
	promised(c, 2, a) // again: it says nothing new
	if leaseAnswers(t, c) {
		t.Fatal("an old promise was counted anew")
	}
	promised(c, 3, heartbeats(c)[3])
	if !leaseAnswers(t, c) {
		t.Fatal("the lease was not renewed")
	}
	if got := leaseWithin(time.Second, 5); got < 952*time.Millisecond || got*105/100 > time.Second {
		t.Errorf("of a second %v are counted on with 5 percent", got)
	}
}

// Who counts towards a lease, and when there is none.
func TestLeaseNeedsAQuorum(t *testing.T) {
	joint := func(c *core) { reconfigured(c, confOf(true, "vxxpp")) }
	learner := func(c *core) { reconfigured(c, confOf(false, "vvvl")) }
	for _, v := range []struct {
		name  string
		n     int
		setup func(c *core)
		from  []memberID
		want  bool
	}{
		{"alone", 1, nil, nil, true},
		{"one of three", 3, nil, nil, false},
		{"two of three", 3, nil, []memberID{3}, true},
		{"two of five", 5, nil, []memberID{4}, false},
		{"three of five", 5, nil, []memberID{4, 2}, true},
		{"one of five twice", 5, nil, []memberID{4, 4}, false},
		{"a learner", 3, learner, []memberID{4}, false},
		{"the old voters", 3, joint, []memberID{2, 3}, false},
		{"the new voters", 3, joint, []memberID{4, 5}, false},
		{"of both", 3, joint, []memberID{2, 5}, true},
	} {
		c := leaseLeader(t, v.n)
		if v.setup != nil {
			v.setup(c)
		}
		sent := heartbeats(c)
		for _, from := range v.from {
			promised(c, from, sent[from])
		}
		if got := leaseAnswers(t, c); got != v.want {
			t.Errorf("%s: a lease: %v", v.name, got)
		}
	}
}

func TestLeaseIsRefused(t *testing.T) {
	held := func(t *testing.T) *core {
		c := leaseLeader(t, 3)
		for id, a := range heartbeats(c) {
			promised(c, id, a)
		}
		if !leaseAnswers(t, c) {
			t.Fatal("no lease")
		}
		return c
	}
	for name, end := range map[string]func(c *core){
		"the machine slept":     func(c *core) { c.slept.atLeast, c.slept.atMost = time.Second, time.Second },
		"nobody knows how long": func(c *core) { c.slept.atMost = forever },
		"a higher term":         func(c *core) { c.onAppendRequest(&appendArgs{Term: c.currentTerm + 1, Leader: 2}, nil) },
		"it voted for another": func(c *core) {
			c.onVoteRequest(&voteArgs{Term: c.currentTerm + 1, Candidate: 2, Last: c.log.lastID(), Transfer: true}, nil)
		},
		"it is dead": func(c *core) { c.die(nil) },
		"a transfer": func(c *core) { c.progressOf(2).match = c.log.last; c.transferLeadership(2) },
		"its configuration is larger": func(c *core) {
			conf := c.configuration
			conf.members = append([]member(nil), conf.members...)
			for id := memberID(4); id <= 7; id++ {
				conf.members = append(conf.members, member{id: id, name: NodeID(rune('a' + id))})
			}
			c.appendConfiguration(conf)
		},
	} {
		c := held(t)
		end(c)
		c.finish()
		if leaseAnswers(t, c) {
			t.Errorf("%s, and a lease is held", name)
		}
	}
	// Not before the first commit of the term, whatever is promised (§8).
	c := withLeases(readLeader(t, 3, true))
	for id, a := range heartbeats(c) {
		promised(c, id, a)
	}
	if leaseAnswers(t, c) {
		t.Error("a lease before the first commit of the term")
	}
	// What was promised with another disk is not known there any more.
	c = leaseLeader(t, 3)
	a := heartbeats(c)[2]
	c.progressOf(2).directory = [16]byte{1}
	c.onAppendReply(2, a, &appendReply{Term: c.currentTerm, Success: true, Promised: true, directory: [16]byte{2}})
	if leaseAnswers(t, c) {
		t.Error("another disk's promise was counted")
	}
	// A leader that asks for none has no lease, and its heartbeats don't ask.
	c = readLeader(t, 3, false)
	for id, a := range heartbeats(c) {
		if a.Lease != 0 {
			t.Error("a promise is asked for, and leases are off")
		}
		promised(c, id, a)
	}
	if leaseAnswers(t, c) {
		t.Error("a lease, and leases are off")
	}
}

// A machine that sleeps between two heartbeats only loses the older promise; one
// that slept before does not matter.
func TestLeaseAfterSleep(t *testing.T) {
	c := leaseLeader(t, 3)
	c.slept = sleep{time.Hour, time.Hour + 100*time.Millisecond}
	a := heartbeats(c)[2]
	promised(c, 2, a)
	if !leaseAnswers(t, c) {
		t.Error("no lease")
	}
	c.slept.atLeast += 399 * time.Millisecond // it may have been at its most when the promise was asked for, or at its least
	c.slept.atMost += 399 * time.Millisecond
	if !leaseAnswers(t, c) {
		t.Error("no lease after a short sleep")
	}
	c.slept.atMost += time.Millisecond
	if leaseAnswers(t, c) {
		t.Error("the machine may have slept too long")
	}
	promised(c, 2, heartbeats(c)[2])
	if !leaseAnswers(t, c) {
		t.Error("no lease after the next heartbeat")
	}
}

// Once somebody was told to campaign no promise counts in this term: the message
// may come after the transfer was given up. In the next term they count again.
func TestNoLeaseAfterTransfer(t *testing.T) {
	for name, start := range map[string]func(c *core){
		"a transfer": func(c *core) { c.transferLeadership(2) },
		"a removal": func(c *core) {
			conf := c.configuration
			conf.members = append([]member(nil), conf.members...)
			conf.members[0].learner = true
			c.leave(&conf)
		},
		"a stuck disk": func(c *core) {
			c.unsyncedSince = c.now.Add(-time.Hour)
			c.yield()
			c.unsyncedSince = time.Time{}
		},
	} {
		c := leaseLeader(t, 3)
		for id, a := range heartbeats(c) {
			promised(c, id, a)
		}
		p := c.progressOf(2)
		p.match, p.matchTerm, p.next = c.log.last, c.currentTerm, c.log.last+1
		start(c)
		told := false
		for _, m := range c.finish().msgs {
			told = told || m.append != nil && m.append.Campaign && m.append.Lease == 0
		}
		if !told || leaseAnswers(t, c) {
			t.Fatalf("%s: told to campaign: %v; or a lease is held still", name, told)
		}
		if name != "a transfer" {
			continue // it leads no more
		}
		for range 30 { // the transfer is given up meanwhile
			c.now = c.now.Add(c.limits.heartbeatInterval)
			for id, a := range heartbeats(c) {
				if a.Lease != 0 {
					t.Fatalf("%s: it asks for promises again", name)
				}
				a.Lease, a.asked = c.limits.leasePromise, c.now // an answer to an earlier heartbeat, in fact
				promised(c, id, a)
			}
		}
		if c.role != Leader || c.transfer.to != 0 || leaseAnswers(t, c) {
			t.Fatalf("%s: a lease is held after it was given up", name)
		}
		c.onAppendRequest(&appendArgs{Term: c.currentTerm + 1, Leader: 3, Prev: c.log.lastID()}, nil)
		persist(t, c)
		for _, m := range elect(t, c) {
			if m.append != nil && !m.append.Heartbeat {
				ack(c, m.to, m.append)
			}
		}
		persist(t, c)
		for id, a := range heartbeats(c) {
			promised(c, id, a)
		}
		if !leaseAnswers(t, c) {
			t.Fatalf("%s: no lease in the next term", name)
		}
	}
}

// promiser returns member 1 of 3, which has promised member 2, the leader of term
// 1, for a second, and whose own election timeout is a tenth of that.
func promiser(t *testing.T) *core {
	t.Helper()
	c := testCore(t, 1, 3)
	c.limits.electionTimeout, c.limits.heartbeatInterval = 100*time.Millisecond, 10*time.Millisecond
	c.onAppendRequest(&appendArgs{Term: 1, Leader: 2, Prev: EntryID{1, 0}, Heartbeat: true, Lease: time.Second}, nil)
	for _, m := range persist(t, c) {
		if m.appendReply != nil && !m.appendReply.Promised {
			t.Fatal("it does not promise")
		}
	}
	return c
}

// Whoever has promised votes for nobody else before that time is over, whatever
// its own timeouts and settings are.
func TestPromiseIsKept(t *testing.T) {
	request := func(c *core, a *voteArgs) bool {
		c.onVoteRequest(a, nil)
		for _, m := range c.finish().msgs {
			if m.voteReply != nil {
				return m.voteReply.Granted
			}
		}
		t.Fatal("no answer")
		return false
	}
	for _, v := range []struct {
		name  string
		ask   voteArgs
		after time.Duration
		want  bool
	}{
		{"a vote", voteArgs{Candidate: 3}, time.Second - 1, false},
		{"a pre-vote", voteArgs{Candidate: 3, PreVote: true}, time.Second - 1, false},
		{"a vote after the promise", voteArgs{Candidate: 3}, time.Second, true},
		{"a pre-vote after the promise", voteArgs{Candidate: 3, PreVote: true}, time.Second, true},
		{"a vote for the leader", voteArgs{Candidate: 2}, 500 * time.Millisecond, true},
		{"a vote that the leader wanted", voteArgs{Candidate: 3, Transfer: true}, 0, true},
		{"a vote for a stranger", voteArgs{Candidate: 99}, time.Second - 1, false},
	} {
		for _, checkQuorum := range []bool{true, false} {
			c := promiser(t)
			c.limits.checkQuorum, c.limits.preVote = checkQuorum, checkQuorum
			c.now = c.now.Add(v.after)
			ask := v.ask
			ask.Term, ask.Last = 7, EntryID{1, 0}
			if got := request(c, &ask); got != v.want {
				t.Errorf("%s, check-quorum %v: granted: %v", v.name, checkQuorum, got)
			}
			if !v.want && c.currentTerm != 1 {
				t.Errorf("%s: a refused request raised the term to %d", v.name, c.currentTerm)
			}
		}
	}
	// A shorter promise takes nothing back, and a newer leader's counts.
	c := promiser(t)
	c.onAppendRequest(&appendArgs{Term: 2, Leader: 3, Prev: EntryID{1, 0}, Heartbeat: true, Lease: time.Millisecond}, nil)
	persist(t, c)
	c.now = c.now.Add(time.Second - 1)
	if request(c, &voteArgs{Term: 3, Candidate: 2, Last: EntryID{1, 0}}) {
		t.Error("a short promise cut a longer one short")
	}
	if !request(c, &voteArgs{Term: 3, Candidate: 3, Last: EntryID{1, 0}}) {
		t.Error("no vote for the leader that has the promise")
	}
	// Heartbeats of the past, and such without a promise, get none.
	for _, a := range []*appendArgs{{Term: 1, Leader: 2, Heartbeat: true, Lease: time.Second}, {Term: 4, Leader: 3, Heartbeat: true}} {
		c := testCore(t, 1, 3)
		c.currentTerm = 2
		if r := hear(t, c, a); r.Promised || c.now.Before(c.promisedUntil) {
			t.Errorf("%+v was promised", a)
		}
	}
}

// Nor does it campaign meanwhile, with pre-votes or without.
func TestPromiserDoesNotCampaign(t *testing.T) {
	for _, preVote := range []bool{true, false} {
		c := promiser(t)
		c.limits.preVote = preVote
		end := c.now.Add(time.Second)
		for c.electionDeadline.Before(end) {
			c.now = c.electionDeadline
			c.tick()
			persist(t, c)
			if c.role != Follower || c.campaign != nil || c.currentTerm != 1 {
				t.Fatalf("it campaigns within its promise: %v, term %d", c.role, c.currentTerm)
			}
		}
		c.now = c.electionDeadline
		c.tick()
		if persist(t, c); c.campaign == nil {
			t.Error("it does not campaign after its promise")
		}
	}
}

// A leader that hangs up is waited for until the promise ends, and no longer; who
// asks for a vote before is refused, whoever saw the connections close.
func TestPromiseOutlivesTheLeadersConnections(t *testing.T) {
	for _, lease := range []time.Duration{0, 500 * time.Millisecond} {
		c := testCore(t, 1, 3)
		c.limits.preVote = true
		hear(t, c, &appendArgs{Term: 1, Leader: 2, Prev: EntryID{1, 0}, Heartbeat: true, Lease: lease})
		end := c.now.Add(lease)
		c.now = c.now.Add(10 * time.Millisecond)
		c.leaderLeft(2)
		if lease == 0 {
			end = c.now
		}
		if want := end.Add(c.limits.electionTimeout / 8); !c.electionDeadline.Equal(want) {
			t.Errorf("promised %v: it campaigns after %v, want %v", lease, c.electionDeadline.Sub(c.now), want.Sub(c.now))
		}
		for _, at := range []time.Time{end.Add(-1), end} {
			if c.now = at; c.protectsLeader(&voteArgs{Term: 2, Candidate: 3, PreVote: true}) != at.Before(end) && lease > 0 {
				t.Errorf("promised %v: %v before its end a pre-vote is refused: %v", lease, end.Sub(at), at.Equal(end))
			}
		}
		c.now = c.electionDeadline
		c.tick()
		if persist(t, c); c.campaign == nil || !c.campaign.preVote {
			t.Errorf("promised %v: it does not ask for pre-votes", lease)
		}
	}
}

// The first reply that says so waits until the promise is durable, later ones only
// if its length changes; after a restart it is kept in full, once. A shorter one is
// saved when a longer one has no more left than it, and none when none goes on.
func TestPromiseIsDurableFirst(t *testing.T) {
	c := testCore(t, 1, 3)
	c.onAppendRequest(&appendArgs{Term: 1, Leader: 2, Prev: EntryID{1, 0}, Heartbeat: true}, nil)
	persist(t, c)
	for _, v := range []struct {
		at, lease time.Duration
		saved     time.Duration // -1: nothing
	}{
		{0, 0, -1}, {0, 100, 100}, {0, 100, -1}, {0, 50, -1}, {0, 0, -1}, {0, 101, 101}, {0, 101, -1},
		{50, 50, -1}, {51, 50, 50}, {60, 50, -1}, {100, 0, -1}, {108, 1, -1}, {109, 1, 1}, {109, 2, 2}, {110, 0, -1}, {111, 0, 0}, {112, 0, -1}, {112, 9, 9},
	} {
		c.now = simEpoch.Add(v.at)
		c.onAppendRequest(&appendArgs{Term: 1, Leader: 2, Prev: EntryID{1, 0}, Heartbeat: true, Lease: v.lease}, nil)
		c.onAppendRequest(&appendArgs{Term: 1, Leader: 2, Prev: EntryID{1, 0}}, nil) // asks for nothing, and says nothing about it
		out := c.finish()
		if v.saved < 0 {
			if out.save != nil || out.msgs[0].needs > c.durableLSN {
				t.Errorf("after %d ns a promise of %d ns is written once more", v.at, v.lease)
			}
			continue
		}
		if out.save == nil || out.save.HardState == nil || out.save.HardState.LeasePromise != v.saved || out.msgs[0].needs < out.save.LSN {
			t.Errorf("after %d ns a promise of %d ns leaves before it is durable: %+v", v.at, v.lease, out.save)
		}
		c.persisted(c.lsn, 0)
	}
	for _, promise := range []time.Duration{0, time.Second} {
		c := restarted(t, 1, 3, HardState{Term: 1, LeasePromise: promise})
		if promise > 0 {
			for _, candidate := range []memberID{1, 2, 3} {
				if c.now = simEpoch.Add(promise - 1); !c.hasPromisedAgainst(candidate) {
					t.Errorf("after a restart it may vote for %d", candidate)
				}
			}
		}
		c.now = simEpoch.Add(promise)
		if c.hasPromisedAgainst(1) || c.hasPromisedAgainst(3) {
			t.Errorf("%v after a restart it does not vote yet", promise)
		}
		if persist(t, c); c.hardSaved.LeasePromise != promise {
			t.Errorf("it forgets a promise of %v: %v", promise, c.hardSaved.LeasePromise)
		}
	}
}

// Without a lease a read begins a round, whose heartbeats also renew the lease.
func TestLeaseFallsBack(t *testing.T) {
	c := leaseLeader(t, 3)
	c.read(1, true, "r")
	out := c.finish()
	if len(out.answers) != 0 || len(out.msgs) != 2 || out.msgs[0].append.Lease == 0 {
		t.Fatalf("%d answers and %d messages, want a round of heartbeats", len(out.answers), len(out.msgs))
	}
	c.onAppendReply(2, out.msgs[0].append, &appendReply{Term: c.currentTerm, Success: true, Promised: true})
	answers, _ := stepReads(c)
	if len(answers) != 1 || !answers[0].ok {
		t.Fatalf("answers are %+v", answers)
	}
	if !leaseAnswers(t, c) {
		t.Error("the round has not renewed the lease")
	}
	c.read(2, true, "r") // a member's: it is told at once when it has the entries
	if out := c.finish(); len(out.answers) != 1 || c.progressOf(2).wanted != c.commitIndex {
		t.Errorf("answers are %+v", out.answers)
	}
	c = testCore(t, 1, 3)
	c.read(1, true, "r")
	if answers, _ := stepReads(c); len(answers) != 1 || answers[0].ok {
		t.Errorf("a follower answers %+v", answers)
	}
}

// leased runs f with a cluster whose leader asks for promises of a second.
func leased(t *testing.T, f func(t *testing.T, h *Harness), more ...func(node int, c *Config)) {
	snapshots(t, 3, f, WithConfig(func(node int, c *Config) {
		c.HeartbeatInterval, c.ElectionTimeout, c.LeaseDuration = 100*time.Millisecond, time.Second, time.Second
		for _, m := range more {
			m(node, c)
		}
	}))
}

// readRound returns how many rounds of heartbeats a node has begun for reads.
func readRound(s *Server) uint64 {
	s.cm.mu.Lock()
	defer s.cm.mu.Unlock()
	return s.cm.core.reads.round
}

// timedRead reads by a lease and returns how long that took, negative if there
// was no answer within d.
func timedRead(t *testing.T, s *Server, d time.Duration) time.Duration {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	defer cancel()
	began := time.Now()
	switch _, err := s.ReadLease(ctx); {
	case err == nil:
		return time.Since(began)
	case !errors.Is(err, ErrNoLeader):
		t.Fatal(err)
	}
	return -1
}

// A leader with a lease reads without a message, also while nobody hears it,
// until the lease ends: before anybody else leads. Then its reads have no answer.
func TestLeaseReadsNeedNoMessage(t *testing.T) {
	leased(t, func(t *testing.T, h *Harness) {
		leader, term := h.CheckSingleLeader()
		proposeN(t, h, "x", 3)
		time.Sleep(time.Second)
		s := h.Server(leader)
		rounds := readRound(s)
		for range 100 {
			if took := timedRead(t, s, time.Second); took != 0 {
				t.Fatalf("a lease read took %v", took)
			}
		}
		follower := h.Server((leader + 1) % 3)
		for range 100 {
			if took := timedRead(t, follower, time.Second); took < 0 || took > 10*time.Millisecond {
				t.Fatalf("a follower's lease read took %v", took)
			}
		}
		if n := readRound(s) - rounds; n != 0 {
			t.Errorf("%d rounds of heartbeats were made for lease reads", n)
		}
		h.DisconnectPeer(leader)
		cut := time.Now()
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go s.ReadIndex(ctx) // a round that nobody answers: it holds up no lease read
		synctest.Wait()
		if n := readRound(s) - rounds; n != 1 {
			t.Fatalf("%d rounds of heartbeats, want 1", n)
		}
		for time.Since(cut) < 800*time.Millisecond {
			if took := timedRead(t, s, time.Second); took != 0 {
				t.Fatalf("%v after the leader was cut off a lease read took %v", time.Since(cut), took)
			}
			time.Sleep(50 * time.Millisecond)
		}
		if now, _ := h.CheckSingleLeader(); now == leader {
			t.Fatal("nobody else leads")
		}
		if took := time.Since(cut); took < 900*time.Millisecond {
			t.Errorf("another leader was elected after %v", took)
		}
		proposeN(t, h, "y", 3)
		if took := timedRead(t, s, time.Second); took >= 0 {
			t.Error("a deposed leader read by its lease")
		}
		h.ReconnectPeer(leader)
		if took := timedRead(t, s, 10*time.Second); took < 0 {
			t.Fatal("it does not read again")
		}
		if got := readJournal(h, leader); got != "x0 x1 x2 y0 y1 y2" {
			t.Errorf("it read %q, led in term %d", got, term)
		}
		h.CheckLinearizable()
	})
}

// Status tells of a lease for exactly as long as reads may rely on it.
func TestStatusLease(t *testing.T) {
	var slept atomic.Int64
	leased(t, func(t *testing.T, h *Harness) {
		leader, _ := h.CheckSingleLeader()
		proposeN(t, h, "x", 1)
		time.Sleep(time.Second)
		for i := range 3 {
			if st := h.Server(i).Status(); st.Lease != (i == leader) {
				t.Errorf("node %d, %v: lease %t", i, st.Role, st.Lease)
			}
		}
		s := h.Server(leader)
		slept.Add(int64(time.Second))
		if s.Status().Lease {
			t.Error("the lease has outlived a sleep of the machine")
		}
		slept.Add(-int64(time.Second))
		h.DisconnectPeer(leader)
		for cut, held := time.Now(), true; held; time.Sleep(time.Millisecond) {
			took := timedRead(t, s, time.Microsecond)
			if held = s.Status().Lease; held != (took == 0) {
				t.Fatalf("%v after the cut: lease %t, a read took %v", time.Since(cut), held, took)
			}
			if time.Since(cut) > time.Second {
				t.Fatal("the lease does not end")
			}
		}
		if st := s.Status(); st.Role != Leader || st.Lease {
			t.Errorf("it has lost its lease: %v, lease %t", st.Role, st.Lease)
		}
	}, func(node int, c *Config) {
		c.sleptFor = func() (sleep, error) {
			d := time.Duration(slept.Load())
			return sleep{d, d}, nil
		}
	})
	virtual(t, 1, func(t *testing.T, h *Harness) {
		if leader, _ := h.CheckSingleLeader(); h.Server(leader).Status().Lease {
			t.Error("a lease where none is configured")
		}
	})
}

// A machine that sleeps loses its lease, although the clock of its timers stood
// still: the read costs a round, or, where nobody hears it, has no answer.
func TestLeaseReadsAfterTheMachineSlept(t *testing.T) {
	var slept [3]atomic.Int64
	leased(t, func(t *testing.T, h *Harness) {
		leader, _ := h.CheckSingleLeader()
		proposeN(t, h, "x", 1)
		time.Sleep(time.Second)
		s := h.Server(leader)
		rounds := readRound(s)
		if took := timedRead(t, s, time.Second); took != 0 || readRound(s) != rounds {
			t.Fatalf("no lease: a read took %v", took)
		}
		slept[leader].Add(int64(time.Second))
		if took := timedRead(t, s, time.Second); took < 0 || readRound(s) != rounds+1 {
			t.Fatalf("a read after a sleep took %v and %d rounds", took, readRound(s)-rounds)
		}
		if took := timedRead(t, s, time.Second); took != 0 || readRound(s) != rounds+1 {
			t.Fatalf("the lease was not renewed: a read took %v", took)
		}
		time.Sleep(time.Second) // until the lease is renewed everywhere
		// A read that begins while a step runs, after a sleep that the step did not see.
		var r *sharedRead
		rounds = readRound(s)
		s.cm.step(func(*core) {
			slept[leader].Add(int64(time.Second))
			r, _ = s.cm.reads.join(true)
		})
		if <-r.done; !r.ok || readRound(s) != rounds+1 {
			t.Fatal("a read was answered by a lease that had ended before it began")
		}
		h.DisconnectPeer(leader)
		slept[leader].Add(int64(time.Second))
		if took := timedRead(t, s, 100*time.Millisecond); took >= 0 {
			t.Fatal("the leader read by a lease that had ended in its sleep")
		}
	}, func(node int, c *Config) {
		c.sleptFor = func() (sleep, error) {
			d := time.Duration(slept[node].Load())
			return sleep{d, d}, nil
		}
	})
}

// A restarted node keeps the longest promise that it made, whatever is
// configured now; one that never promised begins at once.
func TestPromiseSurvivesRestart(t *testing.T) {
	for _, lease := range []time.Duration{0, time.Minute} {
		restarted := false
		leased(t, func(t *testing.T, h *Harness) {
			h.CheckSingleLeader()
			proposeN(t, h, "x", 1)
			time.Sleep(2 * time.Minute)
			restarted = true
			for i := range 3 {
				h.CrashPeer(i)
			}
			began := time.Now()
			for i := range 3 {
				h.RestartPeer(i)
			}
			for range 40 { // the harness waits for ten timeouts at most
				if _, _, ok := h.leader(h.connectedNodes()); ok {
					break
				}
				time.Sleep(3 * time.Second)
			}
			took := time.Since(began)
			if lease == 0 && took > 10*time.Second || lease > 0 && (took < lease || took > lease+10*time.Second) {
				t.Errorf("after promises of %v it took %v to elect a leader", lease, took)
			}
		}, func(_ int, c *Config) {
			c.LeaseDuration = 0
			if !restarted {
				c.HeartbeatInterval, c.ElectionTimeout, c.LeaseDuration = 10*time.Second, time.Minute, lease
			}
		})
	}
}

// Lease reads on all nodes while leaders come and go by cuts and by transfers.
func TestLeaseReadsDuringElections(t *testing.T) {
	leased(t, func(t *testing.T, h *Harness) {
		var wg sync.WaitGroup
		var acknowledged atomic.Uint64
		for k := range 12 {
			leader, _ := h.CheckSingleLeader()
			r, err := h.Server(leader).Propose(t.Context(), fmt.Append(nil, k))
			if err != nil {
				t.Fatal(err)
			}
			acknowledged.Store(uint64(r.Index))
			for i := range 3 {
				for range 5 {
					wg.Go(func() {
						time.Sleep(time.Duration(k*i) * 10 * time.Millisecond)
						want := Index(acknowledged.Load())
						got, err := h.Server(i).ReadLease(t.Context())
						if err != nil || got < want {
							t.Errorf("node %d: ReadLease returned %d, %v; entry %d was acknowledged before", i, got, err, want)
						}
					})
				}
			}
			if k%2 == 0 {
				began := time.Now()
				h.Transfer((leader + 1) % 3)
				if took := time.Since(began); took > 500*time.Millisecond {
					t.Errorf("a transfer took %v: it must not wait for promises", took)
				}
				continue
			}
			h.DisconnectPeer(leader)
			h.CheckSingleLeader()
			h.ReconnectPeer(leader)
		}
		wg.Wait()
		h.CheckLinearizable()
	})
}

// The clocks of this machine are read, if it is one where leases may be.
func TestSleptFor(t *testing.T) {
	first, err := sleptFor()
	if runtime.GOOS != "linux" {
		if err == nil {
			t.Error("no error on a system where sleep can't be seen")
		}
		c := goodConfig()
		if c.LeaseDuration = time.Second; c.Validate() == nil {
			t.Error("leases are accepted on such a system")
		}
		return
	}
	for range 1000 {
		s, err := sleptFor()
		if err != nil {
			t.Fatal(err)
		}
		if s.atLeast > s.atMost || s.atMost < first.atLeast {
			t.Fatalf("the machine has slept for %+v, earlier for %+v", s, first)
		}
	}
	if err != nil {
		t.Error(err)
	}
}

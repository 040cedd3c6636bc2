package raft

import (
	"errors"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// testCore returns the core of member id of a cluster of n voters, which has
// entry 1 and hears about a disk that is always done at once (see persist).
func testCore(t *testing.T, id memberID, n int) *core {
	t.Helper()
	var conf configuration
	for i := range n {
		conf.members = append(conf.members, member{id: memberID(i + 1), name: NodeID(string(rune('a' + i)))})
	}
	first := makeEntry(entryConfiguration, EntryID{1, 0}, time.Time{}, conf.encode())
	l := limits{
		electionTimeout: time.Second, heartbeatInterval: 100 * time.Millisecond, checkQuorum: true,
		gatherBytes: 1, maxFrameBytes: 1, maxInflight: 4, maxInflightBytes: 1 << 20, maxTailBytes: 1 << 20, maxUncommittedSize: 1 << 20,
	}
	rec := Recovered{Last: 1, Runs: []EntryID{{1, 0}}, Tail: []Entries{first}}
	return newCore(id, l, rec, conf, rand.New(rand.NewPCG(uint64(id), 1)), simEpoch)
}

// persist ends a transition, makes what it saved durable and checks the core.
func persist(t *testing.T, c *core) (sent []message) {
	t.Helper()
	var box outbox
	for {
		out := c.finish()
		box.add(out.msgs)
		if err := c.checkState(); err != nil {
			t.Fatal(err)
		}
		if out.save == nil && len(out.msgs) == 0 {
			return box.release(nil, c.durableLSN, c.currentTerm, c.hardLSN)
		}
		c.persisted(c.lsn, 0)
	}
}

// elect makes c the leader, by the votes of everybody.
func elect(t *testing.T, c *core) (sent []message) {
	t.Helper()
	c.now = c.electionDeadline
	c.tick()
	for _, m := range persist(t, c) {
		c.onVoteReply(m.to, m.vote, &voteReply{Term: m.vote.Term, Granted: true})
	}
	if c.role != Leader {
		t.Fatalf("role is %v", c.role)
	}
	return persist(t, c)
}

// A cluster's only voter leads before its vote is durable. It tells nobody which
// entries of that term their proposals have become before it is.
func TestForwardWaitsForTerm(t *testing.T) {
	c := testCore(t, 1, 1)
	if got := c.refusal(2); got != forwardNotLeader {
		t.Errorf("a follower's refusal is %d", got)
	}
	c.now = c.electionDeadline
	c.tick()
	c.finish()
	if got := c.refusal(2); c.role != Leader || got != forwardBusy {
		t.Errorf("with its term not durable, as %v its refusal is %d", c.role, got)
	}
	c.persisted(c.lsn, 0)
	if got := c.refusal(2); got != forwardAccepted {
		t.Errorf("with its term durable its refusal is %d", got)
	}
	c.die(nil)
	if got := c.refusal(2); got != forwardStopped {
		t.Errorf("a stopped node's refusal is %d", got)
	}
}

// loseQuorum lets a leader's heartbeats go unanswered until it steps down.
func loseQuorum(t *testing.T, c *core) {
	t.Helper()
	for c.role == Leader {
		c.now = c.now.Add(c.limits.heartbeatInterval)
		c.heartbeat()
		persist(t, c)
	}
}

func proposeOne(t *testing.T, c *core, data string) []message {
	t.Helper()
	var b entryBuilder
	b.add(entryCommand, []byte(data))
	if _, ok := c.propose(&b); !ok {
		t.Fatal("does not lead")
	}
	return persist(t, c)
}

func appendsTo(to memberID, msgs []message) (out []*appendArgs) {
	for _, m := range msgs {
		if m.to == to && m.append != nil && !m.append.Heartbeat {
			out = append(out, m.append)
		}
	}
	return out
}

func ack(c *core, from memberID, a *appendArgs) {
	c.onAppendReply(from, a, &appendReply{Term: c.currentTerm, Success: true})
}

// A new leader whose clock is behind its predecessor's must not stamp an entry
// with an earlier time. (Simulator, seed 1.)
func TestStampsNeverDecrease(t *testing.T) {
	late := simEpoch.Add(time.Hour)
	a := &appendArgs{Term: 1, Leader: 2, Seq: 1, Prev: EntryID{1, 0}, Entries: []Entries{makeEntry(entryNoop, EntryID{2, 1}, late, nil)}}
	c := testCore(t, 1, 3)
	c.onAppendRequest(a, nil)
	persist(t, c)
	elect(t, c)
	if e, _ := c.log.from(3, 3, 1); e[0].entry(0).Time.Before(late) {
		t.Errorf("entry 3 is stamped %v, entry 2 %v", e[0].entry(0).Time, late)
	}
	// After a restart the newest entry says how late it is.
	rec := Recovered{HardState: HardState{Term: 1}, Last: 2, Runs: []EntryID{{1, 0}, {2, 1}}, Tail: a.Entries}
	c = newCore(1, c.limits, rec, c.configuration, c.rng, simEpoch)
	elect(t, c)
	if e, _ := c.log.from(3, 3, 1); e[0].entry(0).Time.Before(late) {
		t.Errorf("after a restart entry 3 is stamped %v, entry 2 %v", e[0].entry(0).Time, late)
	}
}

// compact keeps the newest entry, whose time the next one must not precede.
func TestCompactKeepsNewestEntry(t *testing.T) {
	c := testCore(t, 1, 1)
	elect(t, c)
	if c.commitIndex != 2 {
		t.Fatalf("commit index is %d", c.commitIndex)
	}
	c.compact(2)
	if c.log.start.Index != 1 || c.log.firstInMemory() != 2 {
		t.Errorf("log starts after %v, memory at %d", c.log.start, c.log.firstInMemory())
	}
}

// A new leader's connection breaks before the follower's first answer: it must
// go on where it was, not at the log's beginning, which may have been
// compacted. (Simulator, seed 3.)
func TestResendBeforeFirstAnswer(t *testing.T) {
	c := testCore(t, 1, 3)
	elect(t, c)
	for range 3 {
		proposeOne(t, c, "x")
	}
	last := c.log.last
	c.onVoteRequest(&voteArgs{Term: 2, Candidate: 3, Last: EntryID{last, 1}, Transfer: true}, nil)
	persist(t, c)
	a := appendsTo(2, elect(t, c))
	if len(a) != 1 || a[0].Prev.Index != last {
		t.Fatalf("sent %+v", a)
	}
	c.onAppendFailed(2, a[0])
	if sent := appendsTo(2, persist(t, c)); len(sent) != 0 {
		t.Errorf("sends again in a hurry: %+v", sent)
	}
	c.heartbeat()
	again := appendsTo(2, persist(t, c))
	if len(again) != 1 || again[0].Prev.Index != last {
		t.Errorf("after the connection broke: %+v, want the append after entry %d again", again, last)
	}
}

// What failed with a connection that was given up says nothing about the one
// after it.
func TestLateFailureOfAnAppend(t *testing.T) {
	c := testCore(t, 1, 3)
	first := appendsTo(2, elect(t, c))[0]
	c.onAppendFailed(2, first)
	c.heartbeat()
	probe := appendsTo(2, persist(t, c))
	if len(probe) != 1 {
		t.Fatalf("sent %+v, want a probe", probe)
	}
	c.onAppendFailed(2, first)
	c.heartbeat()
	if again := appendsTo(2, persist(t, c)); len(again) != 0 {
		t.Errorf("sent %+v, and the probe before it is under way", again)
	}
	ack(c, 2, probe[0])
	if p := c.progressOf(2); p.state != streaming || p.match != probe[0].lastIndex() {
		t.Errorf("after the probe was acknowledged: state %d, match %d", p.state, p.match)
	}
}

// A follower may have more than the leader knows of. Only when it refuses the
// last compacted entry does it need a snapshot.
func TestStarvingIsFoundOutByAsking(t *testing.T) {
	c := testCore(t, 1, 3)
	sent := elect(t, c)
	for range 3 {
		proposeOne(t, c, "x")
	}
	last := c.log.last
	m := appendsTo(3, sent)[0]
	ack(c, 3, &appendArgs{Term: m.Term, Leader: 1, Seq: m.Seq, Prev: EntryID{last, c.currentTerm}})
	persist(t, c)
	if c.commitIndex != last {
		t.Fatalf("commit index is %d, want %d", c.commitIndex, last)
	}
	c.compact(last - 1)
	p := c.progressOf(2)
	p.probeFrom(1, c.appendSeq) // far behind, as far as we know
	probe := appendsTo(2, persist(t, c))
	if len(probe) != 1 || probe[0].Prev.Index != last-1 || p.state != probing {
		t.Fatalf("sent %+v in state %d; want a probe of entry %d", probe, p.state, last-1)
	}
	c.onAppendReply(2, probe[0], &appendReply{Term: c.currentTerm, Hint: EntryID{1, 0}})
	if sent := appendsTo(2, persist(t, c)); len(sent) != 0 || p.state != snapshotting {
		t.Fatalf("sent %+v in state %d; want a follower that waits for a snapshot", sent, p.state)
	}
	ack(c, 2, probe[0])
	if persist(t, c); p.state == snapshotting {
		t.Error("waits for a snapshot after an acknowledgement")
	}
}

// A candidate that is told of a better log lets others campaign first; one that
// merely loses tries again like any other. (Simulator, seed 1795521486681172653:
// two candidates raised their terms in step for 20 timeouts.)
func TestCandidateBehindStandsBack(t *testing.T) {
	for _, behind := range []bool{false, true} {
		c := testCore(t, 1, 3)
		c.now = c.electionDeadline
		c.tick()
		asked := persist(t, c)
		before := c.electionDeadline
		for range 2 { // two voters, or one twice: it waits once
			for _, m := range asked {
				c.onVoteReply(m.to, m.vote, &voteReply{Term: c.currentTerm, Behind: behind})
			}
		}
		want := before
		if behind {
			want = before.Add(2 * c.limits.electionTimeout)
		}
		if c.role != Candidate || !c.electionDeadline.Equal(want) {
			t.Errorf("behind %v: %v campaigns again at %v, want %v", behind, c.role, c.electionDeadline, want)
		}
		c.now = c.electionDeadline
		c.tick()
		old := asked[0].vote
		deadline := c.electionDeadline
		if c.onVoteReply(2, old, &voteReply{Term: 1, Behind: true}); !c.electionDeadline.Equal(deadline) {
			t.Error("an answer to an earlier campaign holds up this one")
		}
	}
	voter := testCore(t, 2, 3)
	voter.onVoteRequest(&voteArgs{Term: 1, Candidate: 1, Last: EntryID{0, 0}}, "t")
	if out := voter.finish(); len(out.msgs) != 1 || !out.msgs[0].voteReply.Behind || out.msgs[0].voteReply.Granted {
		t.Errorf("a voter with a better log answers %+v", out.msgs)
	}
}

// A refusal may overtake the acknowledgement of the append before it. What was
// refused must be sent again all the same. (Simulator, seed 171.)
func TestRefusalBehindLaterAcknowledgement(t *testing.T) {
	c := testCore(t, 1, 3)
	first := appendsTo(2, elect(t, c))
	ack(c, 2, first[0])
	persist(t, c)
	one := appendsTo(2, proposeOne(t, c, "1"))
	two := appendsTo(2, proposeOne(t, c, "2"))
	if len(one) != 1 || len(two) != 1 {
		t.Fatalf("sent %v and %v", one, two)
	}
	// Two arrives first and is refused; one arrives and is accepted; its answer is first.
	ack(c, 2, one[0])
	c.onAppendReply(2, two[0], &appendReply{Term: c.currentTerm, Hint: one[0].Prev})
	again := appendsTo(2, persist(t, c))
	if len(again) != 1 || again[0].lastIndex() != two[0].lastIndex() {
		t.Errorf("sent %+v, want entry %d again", again, two[0].lastIndex())
	}
	if p := c.progressOf(2); p.match != one[0].lastIndex() {
		t.Errorf("match is %d: what was acknowledged is taken for lost", p.match)
	}
}

// keeper is a leader of three servers, whose followers answer when told to.
type keeper struct {
	t *testing.T
	*core
	sent map[memberID]*appendArgs
}

const keeperEntry = 4000 // bytes

func newKeeper(t *testing.T) *keeper {
	k := &keeper{t, readLeader(t, 3, false), make(map[memberID]*appendArgs)}
	k.limits.maxTailBytes, k.limits.maxUncommittedSize = 1, 10*keeperEntry+1
	return k
}

func (k *keeper) persist() {
	for _, m := range persist(k.t, k.core) {
		if m.append != nil && !m.append.Heartbeat {
			k.sent[m.to] = m.append
		}
	}
}

// grow appends two entries, so that the first is not the newest run.
func (k *keeper) grow() (first Index) {
	for range 2 {
		var b entryBuilder
		b.add(entryCommand, make([]byte, keeperEntry-entryHeaderBytes))
		k.propose(&b)
		k.persist()
	}
	return k.log.last - 1
}

func (k *keeper) confirmedBy(ids ...memberID) {
	for _, id := range ids {
		for k.progressOf(id).match < k.log.last {
			ack(k.core, id, k.sent[id])
			k.persist()
		}
	}
}

func (k *keeper) expect(when string, i Index, inMemory bool) {
	k.t.Helper()
	k.evict()
	if got := k.log.firstInMemory() <= i; got != inMemory {
		k.t.Fatalf("%s: memory begins at entry %d, the one in question is %d", when, k.log.firstInMemory(), i)
	}
}

// What is durable and beyond MaxLogMemoryBytes stays in memory while it is about
// to be used: until it is applied here, and confirmed by each follower that is
// sent what is new.
func TestMemoryKeepsWhatIsUsedNext(t *testing.T) {
	k := newKeeper(t)
	i := k.grow()
	k.expect("nobody has confirmed it", i, true)
	k.confirmedBy(2)
	k.applyEnds(k.commitIndex)
	k.expect("it is applied, and the slower follower has not confirmed it", i, true)
	k.confirmedBy(3)
	k.expect("everybody has it", i, false)

	i = k.grow()
	k.confirmedBy(2, 3)
	k.expect("it is not applied", i, true)
	k.applyEnds(k.commitIndex)
	k.expect("it is applied and everybody has it", i, false)

	i = k.grow()
	k.confirmedBy(2)
	k.applyEnds(k.commitIndex)
	k.progressOf(3).resend(k.appendSeq)
	k.expect("follower 3 does not answer", i, false)
}

// The log takes no more memory than may be uncommitted, by one run, however long
// nobody applies or confirms anything. A leader whose disk is quick, and whose
// followers' disks are not, takes no more than may be uncommitted either.
func TestMemoryForTheLogIsBounded(t *testing.T) {
	k := newKeeper(t)
	i := k.grow()
	for range 20 {
		k.grow()
	}
	k.expect("more is waiting than may", i, false)
	if held, bound := k.log.tailBytes, k.limits.maxUncommittedSize; held < bound || held >= bound+keeperEntry {
		t.Errorf("%d bytes are held, the bound is %d", held, bound)
	}
	if k.hasRoom() {
		t.Error("a leader that holds as much as may be uncommitted takes more")
	}
}

// Entries that were read from disk for a leader of one term must not be sent
// by it in a later one: another leader may have replaced them meanwhile.
func TestReadOfAnEarlierTermIsDropped(t *testing.T) {
	c := testCore(t, 1, 3)
	c.limits.maxTailBytes, c.limits.maxUncommittedSize = 1, 1
	elect(t, c)
	for range 3 {
		proposeOne(t, c, "old")
	}
	refuse := func() (entryRequest, bool) {
		p := c.progressOf(2)
		for _, a := range p.inflight {
			c.onAppendReply(2, &appendArgs{Term: c.currentTerm, Seq: a.seq, Prev: EntryID{c.log.last, c.currentTerm}}, &appendReply{Term: c.currentTerm, Hint: EntryID{1, 0}})
			break
		}
		out := c.finish()
		if len(out.reads) != 1 {
			return entryRequest{}, false
		}
		return out.reads[0], true
	}
	q, ok := refuse()
	if !ok || q.lo != 2 {
		t.Fatalf("asked for %+v", q)
	}
	old := sealed(2, 1, "old") // what the slow disk will bring
	c.onAppendRequest(&appendArgs{Term: 2, Leader: 3, Seq: 1, Prev: EntryID{1, 0}, Entries: []Entries{sealed(2, 2, "new", "new")}}, nil)
	persist(t, c)
	elect(t, c)
	if again, ok := refuse(); !ok || again.lo != 2 || again.term != 3 {
		t.Fatalf("asked for %+v", again)
	}
	c.entriesRead(q, []Entries{old})
	if sent := appendsTo(2, persist(t, c)); len(sent) != 0 {
		t.Errorf("sent entries of term %d, read in an earlier leadership", sent[0].Entries[0].term(0))
	}
	if p := c.progressOf(2); !p.reading {
		t.Error("the read of this leadership is not waited for any more")
	}
}

// A follower that lost what it had acknowledged is found out by the first
// append that it refuses, and brought up again, without a heartbeat.
func TestLostDataIsFoundByAnAppend(t *testing.T) {
	c, f := testCore(t, 1, 3), testCore(t, 2, 3)
	ack(c, 2, appendsTo(2, elect(t, c))[0])
	persist(t, c)
	if p := c.progressOf(2); p.match != 2 {
		t.Fatalf("match is %d", p.match)
	}
	sent := appendsTo(2, proposeOne(t, c, "x")) // and f has entry 1 only
	lost := 0
	for round := 0; len(sent) > 0; round++ {
		if round == 5 {
			t.Fatalf("the leader still sends entries after %v, and the follower's log ends at %d", sent[0].Prev, f.log.last)
		}
		a := sent[0]
		f.onAppendRequest(a, nil)
		c.onAppendReply(2, a, persist(t, f)[0].appendReply)
		for _, e := range c.out.events {
			if e.Kind == EventFollowerLostData && e.Index == 2 {
				lost++
			}
		}
		sent = appendsTo(2, persist(t, c))
	}
	if f.log.last != 3 || c.progressOf(2).match != 3 || lost != 1 {
		t.Errorf("the follower's log ends at %d, match is %d, the loss was told %d times", f.log.last, c.progressOf(2).match, lost)
	}
}

// A leader that did not run for a while takes a heartbeat's time to read the
// answers that wait, before it misses its quorum. It does so once.
func TestStalledLeaderReadsAnswersFirst(t *testing.T) {
	steps := map[string]func(c *core){"timer": (*core).tick, "heartbeat": (*core).heartbeat}
	for name, step := range steps {
		for _, stall := range []time.Duration{950 * time.Millisecond, time.Hour} {
			t.Run(name+" after "+stall.String(), func(t *testing.T) {
				c := testCore(t, 1, 3)
				first := appendsTo(2, elect(t, c))[0]
				ack(c, 2, first)
				persist(t, c)
				c.now = c.now.Add(50 * time.Millisecond)
				c.heartbeat()
				persist(t, c)
				beat := &appendArgs{Term: c.currentTerm, Leader: 1, Heartbeat: true}
				interval := c.limits.heartbeatInterval

				c.now = c.now.Add(stall)
				step(c)
				persist(t, c)
				if c.role != Leader {
					t.Fatal("it gave up before it had read anything")
				}
				c.now = c.now.Add(interval / 2) // the ticker's next tick may be due soon
				c.heartbeat()
				c.tick()
				persist(t, c)
				if c.role != Leader {
					t.Fatal("it gave up before a heartbeat's time was over")
				}
				c.onAppendReply(2, beat, &appendReply{Term: c.currentTerm, Success: true})
				for range 9 { // all is well for almost an election timeout
					c.now = c.now.Add(interval)
					c.heartbeat()
					c.tick()
					persist(t, c)
				}
				if c.role != Leader {
					t.Fatal("it gave up although it had heard from a majority")
				}

				c.now = c.now.Add(stall) // again, and nobody answers
				step(c)
				persist(t, c)
				if c.role != Leader {
					t.Fatal("a second stall is not forgiven although a majority was heard after the first")
				}
				c.now = c.now.Add(c.electionDeadline.Sub(c.now))
				c.tick()
				persist(t, c)
				if c.role == Leader {
					t.Fatal("it leads on without a majority")
				}
			})
		}
	}
}

// However often a leader without a majority stalls, it gives up: an election
// timeout, one stall and one heartbeat after it last heard from a majority.
func TestStallsDoNotKeepALeader(t *testing.T) {
	c := testCore(t, 1, 3)
	elect(t, c)
	began := c.now
	stall := 3 * c.limits.heartbeatInterval
	for c.role == Leader {
		if c.now.Sub(began) > c.limits.electionTimeout+stall+c.limits.heartbeatInterval {
			t.Fatalf("it still leads after %v", c.now.Sub(began))
		}
		c.now = c.now.Add(stall)
		c.heartbeat()
		c.tick()
		persist(t, c)
	}
	if c.now.Sub(began) <= c.limits.electionTimeout {
		t.Errorf("it gave up after %v", c.now.Sub(began))
	}
}

// With two configurations a leader must hear from both majorities (thesis 4.3).
func TestCheckQuorumInJointConfiguration(t *testing.T) {
	for _, v := range []struct {
		heard []memberID
		leads bool
	}{
		{[]memberID{2, 3}, false}, // the old voters
		{[]memberID{4, 5}, false}, // the new ones
		{[]memberID{3, 4}, true},
	} {
		c := reconfigured(readLeader(t, 3, false), confOf(true, "vxxpp"))
		for range 20 { // two election timeouts
			c.now = c.now.Add(c.limits.heartbeatInterval)
			for id, a := range heartbeats(c) {
				if slices.Contains(v.heard, id) {
					c.onAppendReply(id, a, &appendReply{Term: c.currentTerm, Success: true})
				}
			}
			c.tick()
		}
		if leads := c.role == Leader; leads != v.leads {
			t.Errorf("a leader that hears %v leads: %v", v.heard, leads)
		}
	}
}

// A leader whose connection to another server broke shows it at once that it is
// there; nobody else does.
func TestReconnect(t *testing.T) {
	c := readLeader(t, 3, false)
	c.reconnect(2)
	c.reconnect(99) // it is no member any more
	if sent := c.finish().msgs; len(sent) != 1 || sent[0].to != 2 || sent[0].append == nil || !sent[0].append.Heartbeat {
		t.Errorf("sent %+v, want a heartbeat to member 2", sent)
	}
	c.stepDown(ReasonNoQuorum)
	c.finish()
	c.reconnect(2)
	if sent := c.finish().msgs; len(sent) != 0 {
		t.Errorf("a follower sent %+v", sent)
	}
}

// Every change of role says why.
func TestRoleReasons(t *testing.T) {
	timeOut := func(c *core) { c.now = c.electionDeadline; c.tick() }
	lead := func(c *core) { elect(t, c) }
	follow := func(c *core) { hear(t, c, appendFrom(1, EntryID{1, 0}, 0)) }
	for _, test := range []struct {
		name   string
		before func(*core)
		event  func(*core)
		role   Role
		reason Reason
		peer   NodeID
	}{
		{"timeout", nil, timeOut, Candidate, ReasonTimeout, ""},
		{"transfer", follow, func(c *core) {
			a := appendFrom(1, EntryID{1, 0}, 0)
			a.Heartbeat, a.Campaign = true, true
			c.onAppendRequest(a, nil)
		}, Candidate, ReasonTransfer, ""},
		{"leader left", func(c *core) {
			c.limits.preVote = true
			follow(c)
			c.leaderLeft(2)
			timeOut(c)
			persist(t, c)
		}, func(c *core) { c.onVoteReply(3, &voteArgs{Term: 2, PreVote: true}, &voteReply{Term: 1, Granted: true}) }, Candidate, ReasonLeaderLeft, ""},
		{"elected", timeOut, func(c *core) { c.onVoteReply(3, &voteArgs{Term: 1}, &voteReply{Term: 1, Granted: true}) }, Leader, ReasonElected, ""},
		{"asked in a higher term", timeOut, func(c *core) { c.onVoteRequest(&voteArgs{Term: 7, Candidate: 3}, nil) }, Follower, ReasonHigherTerm, "c"},
		{"told of a higher term", timeOut, func(c *core) { c.onVoteReply(3, &voteArgs{Term: 1}, &voteReply{Term: 7}) }, Follower, ReasonHigherTerm, "c"},
		{"new leader", timeOut, func(c *core) { c.onAppendRequest(appendFrom(1, EntryID{1, 0}, 0), nil) }, Follower, ReasonNewLeader, "b"},
		{"split vote", func(c *core) { timeOut(c); persist(t, c); c.limits.preVote = true }, timeOut, Follower, ReasonSplitVote, ""},
		{"no quorum", lead, func(c *core) {
			for c.role == Leader {
				c.now = c.now.Add(c.limits.heartbeatInterval)
				c.heartbeat()
				c.tick()
			}
		}, Follower, ReasonNoQuorum, ""},
		{"apply failed", timeOut, func(c *core) { c.stopApplying(1, errors.New("test")) }, Follower, ReasonApplyFailed, ""},
		{"shutdown", lead, func(c *core) { c.retire() }, Follower, ReasonShutdown, ""},
		{"stuck", lead, func(c *core) { c.unsyncedSince = c.now.Add(-time.Hour); c.yield() }, Follower, ReasonStuck, ""},
	} {
		c := testCore(t, 1, 3)
		c.limits.preVote = false
		if test.before != nil {
			test.before(c)
		}
		persist(t, c)
		test.event(c)
		var last Event
		for _, e := range c.finish().events {
			if e.Kind == EventRole {
				last = e
			}
		}
		if last.Role != test.role || last.Reason != test.reason || last.Peer != test.peer || c.role != test.role {
			t.Errorf("%s: %q, reason %d; want a %v, reason %d (%v), by %q", test.name, last, last.Reason, test.role, test.reason, test.reason, test.peer)
		}
	}
}

// A server that needs nobody's vote does not wait for a leader when it starts,
// and one that has promised a lease waits for no longer than that. Others wait
// for an election timeout.
func TestFirstElection(t *testing.T) {
	for name, v := range map[string]struct {
		servers int
		promise time.Duration
		wait    [2]time.Duration
	}{
		"alone":                          {1, 0, [2]time.Duration{}},
		"alone, promised":                {1, 3 * time.Second, [2]time.Duration{3 * time.Second, 3 * time.Second}},
		"of three":                       {3, 0, [2]time.Duration{time.Second, 2*time.Second - 1}},
		"of three, shorter than promise": {3, 3 * time.Second, [2]time.Duration{time.Second, 2*time.Second - 1}},
	} {
		c := restarted(t, 1, v.servers, HardState{Term: 1, LeasePromise: v.promise})
		if wait := c.electionDeadline.Sub(simEpoch); wait < v.wait[0] || wait > v.wait[1] {
			t.Errorf("%s: it waits for %v, want %v to %v", name, wait, v.wait[0], v.wait[1])
		}
		c.now = simEpoch.Add(v.wait[0])
		c.tick()
		if persist(t, c); (c.role == Leader) != (v.servers == 1) {
			t.Errorf("%s: it is a %v then", name, c.role)
		}
	}
}

package raft

import (
	"errors"
	"math/rand/v2"
	"testing"
)

// A snapshot may be durable before the log is: the rest of the log stays until
// it is. (Simulator, TestSimSnapshots, seed 4.)
func TestSnapshotBeforeTheLogIsDurable(t *testing.T) {
	c := testCore(t, 1, 3)
	entries := []Entries{sealed(2, 1, "a", "b", "c")}
	c.onAppendRequest(&appendArgs{Term: 1, Leader: 2, Seq: 1, Prev: EntryID{1, 0}, Commit: 4, Entries: entries}, nil)
	c.finish()
	if c.commitIndex != 4 || c.durableIndex != 1 {
		t.Fatalf("commit index is %d, durable %d", c.commitIndex, c.durableIndex)
	}
	c.snapshotTaken(EntryID{4, 1}, 4)
	persist(t, c)
	if c.log.start.Index > 1 || c.newestSnapshot.Index != 4 {
		t.Errorf("log starts after %v, snapshot ends with %v", c.log.start, c.newestSnapshot)
	}
}

// A snapshot may be durable before the term of its last entry is: a server that
// restarts from it is in that term at least, without a vote in it.
func TestRestoredTerm(t *testing.T) {
	c := testCore(t, 1, 3)
	meta := snapshotUpTo(7, 4, 2)
	rec := Recovered{HardState: HardState{Term: 2, VotedFor: 3}, Last: 1, Runs: []EntryID{{1, 0}}}
	c = newCore(1, c.limits, rec, c.configuration, rand.New(rand.NewPCG(1, 1)), simEpoch)
	c.restored(&meta)
	persist(t, c)
	if c.currentTerm != 4 || c.votedFor != 0 || c.log.start != meta.Last {
		t.Errorf("term is %d, vote %d, the log starts after %v", c.currentTerm, c.votedFor, c.log.start)
	}
}

// followerWith returns a follower that has entries up to last, of term 1, all
// durable, and knows that those up to commit are committed.
func followerWith(t *testing.T, last, commit Index) *core {
	t.Helper()
	c := testCore(t, 1, 3)
	c.onAppendRequest(&appendArgs{Term: 1, Leader: 2, Seq: 1, Prev: EntryID{1, 0}, Commit: commit, Entries: []Entries{sealed(2, 1, make([]string, last-1)...)}}, nil)
	persist(t, c)
	if c.log.last != last || c.commitIndex != commit {
		t.Fatalf("log ends at %d, commit index is %d", c.log.last, c.commitIndex)
	}
	return c
}

// install offers a snapshot to a follower and, if it wants it, installs it.
func install(t *testing.T, c *core, term Term, meta SnapshotMeta) (r snapshotReply, save *Save) {
	t.Helper()
	wanted := c.onInstallSnapshot(&snapshotArgs{Term: term, Leader: 2, Meta: meta}, &r)
	persist(t, c)
	if !wanted {
		return r, nil
	}
	c.installSnapshot(&meta)
	out := c.finish()
	if out.save != nil {
		c.persisted(out.save.LSN, 0)
	}
	if err := c.checkState(); err != nil {
		t.Fatal(err)
	}
	return r, out.save
}

// A snapshot of an earlier term is refused with the term. One that ends at or
// before commitIndex is of no use, and nothing of the log is changed by it.
func TestInstallOlderSnapshot(t *testing.T) {
	for _, i := range []Index{2, 4, 5} {
		c := followerWith(t, 8, 5)
		meta := snapshotUpTo(i, 1, 2)
		if r, save := install(t, c, 1, meta); !r.Done || r.Term != 1 || save != nil {
			t.Errorf("a snapshot up to %d is answered %+v, saved is %v", i, r, save)
		}
		c.installSnapshot(&meta) // it was wanted when its last block came
		if out := c.finish(); out.save != nil || c.commitIndex != 5 || c.log.last != 8 || c.log.start.Index != 0 || len(c.configuration.members) != 3 {
			t.Errorf("a snapshot up to %d, commit index 5: log %v to %d, commit %d", i, c.log.start, c.log.last, c.commitIndex)
		}
		if c.newestSnapshot.Index != i {
			t.Errorf("the newest snapshot ends with %v, stored is one up to %d", c.newestSnapshot, i)
		}
	}
	c := followerWith(t, 8, 5)
	c.onVoteRequest(&voteArgs{Term: 3, Candidate: 3, Last: EntryID{9, 1}, Transfer: true}, nil)
	persist(t, c)
	if r, save := install(t, c, 1, snapshotUpTo(7, 1, 2)); r.Done || r.Term != 3 || save != nil || c.commitIndex != 5 {
		t.Errorf("a snapshot of an earlier term is answered %+v, commit index is %d", r, c.commitIndex)
	}
}

// A log that has the snapshot's last entry keeps what follows, also what is not
// durable.
func TestInstallKeepsMatchingSuffix(t *testing.T) {
	c := followerWith(t, 8, 3)
	c.onAppendRequest(&appendArgs{Term: 1, Leader: 2, Seq: 2, Prev: EntryID{8, 1}, Entries: []Entries{sealed(9, 1, "y", "z")}}, nil)
	c.finish()
	meta := snapshotUpTo(6, 1, 2)
	c.installSnapshot(&meta)
	out := c.finish()
	if out.save != nil || c.log.last != 10 || c.log.start.Index != 0 || c.commitIndex != 6 || c.durableIndex != 8 || len(c.configuration.members) != 3 {
		t.Errorf("log %v to %d, commit %d, durable %d, saved %+v", c.log.start, c.log.last, c.commitIndex, c.durableIndex, out.save)
	}
	if c.persisted(c.lsn, 0); c.durableIndex != 10 {
		t.Errorf("durable %d after everything was flushed", c.durableIndex)
	}
}

// A log that does not have the snapshot's last entry is replaced, configuration
// included, and appends go on behind the snapshot.
func TestInstallReplacesLog(t *testing.T) {
	for name, meta := range map[string]SnapshotMeta{
		"conflict in the middle": snapshotUpTo(6, 2, 2),
		"conflict at the end":    snapshotUpTo(8, 2, 2),
		"shorter log":            snapshotUpTo(20, 1, 2),
		"the next entry":         snapshotUpTo(9, 1, 2),
	} {
		t.Run(name, func(t *testing.T) {
			c := followerWith(t, 8, 3)
			r, save := install(t, c, 2, meta)
			if r.Done || save == nil || save.Start == nil || *save.Start != meta.Last || save.Snapshot == nil || len(save.Entries) != 0 {
				t.Fatalf("answered %+v, saved %+v", r, save)
			}
			if c.log.start != meta.Last || c.log.last != meta.Last.Index || c.commitIndex != meta.Last.Index || c.durableIndex != meta.Last.Index || len(c.configuration.members) != 2 || c.newestSnapshot != meta.Last {
				t.Errorf("log %v to %d, commit %d, durable %d, %d members", c.log.start, c.log.last, c.commitIndex, c.durableIndex, len(c.configuration.members))
			}
			c.onAppendRequest(&appendArgs{Term: 2, Leader: 2, Seq: 9, Prev: meta.Last, Entries: []Entries{sealed(meta.Last.Index+1, 2, "y")}}, nil)
			sent := persist(t, c)
			if len(sent) != 1 || !sent[0].appendReply.Success || c.log.last != meta.Last.Index+1 {
				t.Errorf("an append behind it is answered %+v", sent)
			}
			if c.lastTime.Before(meta.Time) {
				t.Errorf("the snapshot is of %v, the next entry could be of %v", meta.Time, c.lastTime)
			}
		})
	}
}

// A flush of what was staged before the log was replaced confirms nothing of
// the log that followed.
func TestInstallDuringFlush(t *testing.T) {
	c := followerWith(t, 3, 3)
	c.onAppendRequest(&appendArgs{Term: 1, Leader: 2, Seq: 2, Prev: EntryID{3, 1}, Entries: []Entries{sealed(4, 1, "p", "q", "r", "s")}}, nil)
	c.finish()
	staged := c.lsn
	meta := snapshotUpTo(5, 2, 2)
	c.onInstallSnapshot(&snapshotArgs{Term: 2, Leader: 2, Meta: meta}, &snapshotReply{})
	c.installSnapshot(&meta)
	c.finish()
	c.onAppendRequest(&appendArgs{Term: 2, Leader: 2, Seq: 3, Prev: meta.Last, Entries: []Entries{sealed(6, 2, "n", "o")}}, nil)
	c.finish()
	if c.persisted(staged, 0); c.durableIndex != 5 {
		t.Errorf("durable %d by a flush of the log that was replaced", c.durableIndex)
	}
	if c.persisted(c.lsn, 0); c.durableIndex != 7 {
		t.Errorf("durable %d after everything was flushed", c.durableIndex)
	}
}

// Two snapshots are installed, the newer one first or last, and a truncation
// or appends come between.
func TestInstallRacesNewerSnapshot(t *testing.T) {
	older, newer := snapshotUpTo(10, 2, 2), snapshotUpTo(15, 2, 3)
	send := func(c *core, prev EntryID, commit Index, data ...string) {
		c.onAppendRequest(&appendArgs{Term: 2, Leader: 2, Seq: 3, Prev: prev, Entries: []Entries{sealed(prev.Index+1, 2, data...)}, Commit: commit}, nil)
	}
	for name, steps := range map[string][]func(c *core){
		"newer first":        {func(c *core) { c.installSnapshot(&newer) }, func(c *core) { c.installSnapshot(&older) }},
		"newer last":         {func(c *core) { c.installSnapshot(&older) }, func(c *core) { c.installSnapshot(&newer) }},
		"twice":              {func(c *core) { c.installSnapshot(&newer) }, func(c *core) { c.installSnapshot(&newer) }},
		"own one after":      {func(c *core) { c.installSnapshot(&newer) }, func(c *core) { c.snapshotTaken(EntryID{7, 1}, 7) }},
		"truncation between": {func(c *core) { send(c, EntryID{4, 1}, 3, "t") }, func(c *core) { c.installSnapshot(&newer) }},
		"appends between": {
			func(c *core) { c.installSnapshot(&older) },
			func(c *core) { send(c, older.Last, 13, "a", "b", "c", "d", "e") },
			func(c *core) { c.installSnapshot(&newer) },
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := followerWith(t, 8, 3)
			var r snapshotReply
			if !c.onInstallSnapshot(&snapshotArgs{Term: 2, Leader: 2, Meta: newer}, &r) {
				t.Fatalf("answered %+v", r)
			}
			for _, step := range steps {
				c.finish()
				step(c)
			}
			persist(t, c)
			if c.newestSnapshot != newer.Last || c.commitIndex != 15 || c.log.last != 15 || !c.log.matches(newer.Last) {
				t.Errorf("snapshot %v, log %v to %v, commit %d", c.newestSnapshot, c.log.start, c.log.lastID(), c.commitIndex)
			}
		})
	}
}

// A server that campaigns when a snapshot replaces its log stops that: it may be
// another member by the new configuration. (Simulator, seed 101927.)
func TestInstallEndsCampaign(t *testing.T) {
	for _, told := range []bool{false, true} { // that it was removed, which ends the asking but not the candidacy
		c := followerWith(t, 8, 3)
		c.name = "a"
		conf := configuration{members: []member{{id: 2, name: "b"}, {id: 3, name: "c"}, {id: 9, name: "a"}}}
		meta := snapshotUpTo(20, 1, 2)
		meta.Config = conf.encode()
		c.onInstallSnapshot(&snapshotArgs{Term: 1, Leader: 2, Meta: meta}, &snapshotReply{})
		c.now = c.electionDeadline
		c.tick()
		asked := persist(t, c)
		if c.role != Candidate || len(asked) != 2 {
			t.Fatalf("role is %v, %d votes are asked for", c.role, len(asked))
		}
		if told {
			c.onVoteReply(2, asked[0].vote, &voteReply{Term: 1, Removed: true})
			persist(t, c)
		}
		c.installSnapshot(&meta)
		persist(t, c)
		for _, m := range asked {
			c.onVoteReply(m.to, m.vote, &voteReply{Term: m.vote.Term, Granted: true})
		}
		persist(t, c)
		if c.role != Follower || c.self != 9 || c.votedFor != 1 {
			t.Errorf("told %v: member %d is %v and voted for %d", told, c.self, c.role, c.votedFor)
		}
	}
}

// A joint configuration in a snapshot holds as one in the log does: votes of
// both majorities are needed.
func TestInstallJointConfiguration(t *testing.T) {
	c := followerWith(t, 4, 4)
	meta := snapshotUpTo(9, 1, 2)
	joint := configuration{joint: true, members: []member{
		{id: 1, name: "a"}, {id: 2, name: "b", next: leaves}, {id: 3, name: "c", next: leaves},
		{id: 4, name: "d", learner: true, next: becomesVoter}, {id: 5, name: "e", learner: true, next: becomesVoter},
	}}
	meta.ConfigIndex, meta.Config = 7, joint.encode()
	install(t, c, 1, meta)
	if !c.configuration.joint || len(c.configs) != 1 || c.configs[0].index != 7 {
		t.Fatalf("configurations %+v", c.configs)
	}
	c.now = c.electionDeadline
	c.tick()
	asked := persist(t, c)
	for _, from := range []memberID{2, 3, 4} { // 1, 2 and 3 are all voters of before, 1 is one of three after
		if c.role == Leader {
			t.Fatalf("leads before %d has voted", from)
		}
		for _, m := range asked {
			if m.to == from {
				c.onVoteReply(from, m.vote, &voteReply{Term: m.vote.Term, Granted: true})
			}
		}
		persist(t, c)
	}
	if c.role != Leader {
		t.Fatalf("role is %v with the votes of 1, 2, 3 and 4; asked were %d", c.role, len(asked))
	}
}

// leaderSnapshotting returns a leader that sends member 2 its snapshot, which
// ends with the entry before the last, and the request.
func leaderSnapshotting(t *testing.T) (*core, snapshotRequest) {
	t.Helper()
	c := testCore(t, 1, 3)
	m := appendsTo(3, elect(t, c))[0]
	for range 6 {
		proposeOne(t, c, "x")
	}
	ack(c, 3, &appendArgs{Term: m.Term, Leader: 1, Seq: m.Seq, Prev: EntryID{c.log.last, 1}})
	persist(t, c)
	c.snapshotTaken(EntryID{c.commitIndex - 1, 1}, c.commitIndex-1)
	p := c.progressOf(2)
	p.probeFrom(1, c.appendSeq)
	probe := appendsTo(2, persist(t, c))
	if len(probe) != 1 || probe[0].Prev != c.log.start {
		t.Fatalf("asks for %+v, the log starts after %v", probe, c.log.start)
	}
	c.onAppendReply(2, probe[0], &appendReply{Term: c.currentTerm, Hint: EntryID{1, 0}})
	out := c.finish()
	if len(out.snapshots) != 1 || p.state != snapshotting {
		t.Fatalf("state %d, requests %+v", p.state, out.snapshots)
	}
	return c, out.snapshots[0]
}

// commitOne appends an entry that member 3 acknowledges.
func commitOne(t *testing.T, c *core) {
	t.Helper()
	for _, a := range appendsTo(3, proposeOne(t, c, "y")) {
		ack(c, 3, a)
	}
	if persist(t, c); c.commitIndex != c.log.last {
		t.Fatalf("commit index is %d, the log ends at %d", c.commitIndex, c.log.last)
	}
}

// While a snapshot is on its way the log behind it stays; afterwards, whether it
// arrived or not, it may go with the next snapshot.
func TestCompactionWaitsForTransfer(t *testing.T) {
	for _, err := range []error{nil, errSimDisk} {
		c, q := leaderSnapshotting(t)
		sent := c.newestSnapshot
		for range 5 {
			commitOne(t, c)
		}
		c.snapshotTaken(EntryID{c.commitIndex, 1}, c.commitIndex)
		if persist(t, c); c.log.start != sent {
			t.Fatalf("log starts after %v while a snapshot up to %v is on its way", c.log.start, sent)
		}
		c.snapshotSent(q, sent, err)
		after := appendsTo(2, persist(t, c))
		if err == nil && (len(after) != 1 || after[0].Prev != sent) {
			t.Fatalf("after the transfer: %+v, want an append behind %v", after, sent)
		}
		if err != nil && len(after) != 0 {
			t.Fatalf("after a failure, before the next heartbeat: %+v", after)
		}
		commitOne(t, c)
		c.snapshotTaken(EntryID{c.commitIndex, 1}, c.commitIndex)
		persist(t, c)
		if err == nil { // it must get what follows, or it would need the next snapshot
			if c.log.start != sent {
				t.Fatalf("log starts after %v while a follower catches up from %v", c.log.start, sent)
			}
			c.now = c.now.Add(snapshotPatience * c.limits.electionTimeout) // and it does not
			commitOne(t, c)
			c.snapshotTaken(EntryID{c.commitIndex, 1}, c.commitIndex)
			persist(t, c)
		}
		if c.log.start.Index != c.commitIndex-1 {
			t.Errorf("log starts after %v once nothing is on its way, commit index is %d", c.log.start, c.commitIndex)
		}
		if err != nil {
			c.heartbeat()
			if again := appendsTo(2, persist(t, c)); len(again) != 1 {
				t.Errorf("after a heartbeat: %+v, want a probe", again)
			}
		}
	}
}

// A follower that has caught up once after a snapshot holds up nothing.
func TestCompactionAfterCatchingUp(t *testing.T) {
	c, q := leaderSnapshotting(t)
	sent := c.newestSnapshot
	for range 3 {
		commitOne(t, c)
	}
	c.snapshotSent(q, sent, nil)
	for acked := 0; c.progressOf(2).match < c.log.last; acked++ {
		if acked > 20 {
			t.Fatalf("it did not catch up: %+v", c.progressOf(2))
		}
		for _, a := range appendsTo(2, persist(t, c)) {
			ack(c, 2, a)
		}
	}
	commitOne(t, c) // it is like any other now: it may fall behind again
	commitOne(t, c)
	c.snapshotTaken(EntryID{c.commitIndex, 1}, c.commitIndex)
	if persist(t, c); c.log.start.Index != c.commitIndex-1 {
		t.Errorf("log starts after %v, commit index is %d", c.log.start, c.commitIndex)
	}
}

// Where nothing follows the snapshot there is an entry to probe with all the
// same, and its acknowledgement raises match.
func TestProbeAfterTransferWithoutEntries(t *testing.T) {
	c, q := leaderSnapshotting(t)
	last := EntryID{c.log.last, 1}
	c.snapshotTaken(last, last.Index)
	persist(t, c)
	c.snapshotSent(q, last, nil)
	sent := appendsTo(2, persist(t, c))
	if len(sent) != 1 || sent[0].lastIndex() != last.Index {
		t.Fatalf("sent %+v, want a probe with entry %d", sent, last.Index)
	}
	f := testCore(t, 2, 3)
	meta := snapshotUpTo(last.Index, 1, 2)
	meta.Config = f.configuration.encode()
	f.onInstallSnapshot(&snapshotArgs{Term: 1, Leader: 1, Meta: meta}, &snapshotReply{})
	f.installSnapshot(&meta)
	persist(t, f)
	f.onAppendRequest(sent[0], nil)
	reply := persist(t, f)
	if len(reply) != 1 || !reply[0].appendReply.Success || f.log.last != last.Index || f.log.start != last {
		t.Fatalf("answered %+v, log %v to %d", reply, f.log.start, f.log.last)
	}
	c.onAppendReply(2, sent[0], reply[0].appendReply)
	persist(t, c)
	if p := c.progressOf(2); p.match != last.Index || p.state != streaming {
		t.Errorf("match %d, state %d", p.match, p.state)
	}
}

// An acknowledgement that was on its way when the leader began to send a
// snapshot ends that, if it shows that the follower can do without.
func TestAckDuringTransfer(t *testing.T) {
	c, q := leaderSnapshotting(t)
	start := c.log.start
	ack(c, 2, &appendArgs{Term: c.currentTerm, Leader: 1, Prev: EntryID{start.Index - 1, 1}})
	if persist(t, c); c.progressOf(2).state != snapshotting {
		t.Fatal("an entry that was compacted is no reason to stop sending")
	}
	ack(c, 2, &appendArgs{Term: c.currentTerm, Leader: 1, Prev: start})
	sent := appendsTo(2, persist(t, c))
	if p := c.progressOf(2); p.state == snapshotting || len(sent) != 1 || sent[0].Prev != start {
		t.Fatalf("state %d, sent %+v", p.state, sent)
	}
	if c.snapshotProgress(q, 3, 10) {
		t.Error("the transfer goes on")
	}
	before := *c.progressOf(2)
	c.snapshotSent(q, c.newestSnapshot, nil)
	if now := *c.progressOf(2); now.state != before.state || now.next != before.next {
		t.Error("the end of a transfer that is not wanted any more moved the window")
	}
}

// Both sides of a snapshot's edge: entries before, at and behind the last
// compacted one, as prev of an append.
func TestAppendAtSnapshotEdge(t *testing.T) {
	for prev := Index(3); prev <= 8; prev++ {
		for _, term := range []Term{1, 2} {
			c := followerWith(t, 8, 6)
			c.snapshotTaken(EntryID{6, 1}, 5)
			if persist(t, c); c.log.start.Index != 5 {
				t.Fatalf("log starts after %v", c.log.start)
			}
			if term == 2 && prev < 7 {
				continue // no leader has another entry where one is committed
			}
			c.onAppendRequest(&appendArgs{Term: 3, Leader: 3, Seq: 1, Prev: EntryID{prev, term}, Entries: []Entries{sealed(prev+1, term, make([]string, 9-prev)...)}}, nil)
			r := persist(t, c)[0].appendReply
			switch {
			case term == 2 && (r.Success || r.Hint.Index >= prev || r.Hint.Index < 5 || c.log.last != 8):
				t.Errorf("prev %d of term %d: %+v, log ends at %d", prev, term, r, c.log.last)
			case term == 1 && (!r.Success || c.log.last != 9 || c.log.start.Index != 5):
				t.Errorf("prev %d: %+v, log %v to %d", prev, r, c.log.start, c.log.last)
			}
		}
	}
}

// A proposal whose index is inside an installed snapshot has an unknown
// outcome; a later one waits on, unless its term is over.
func TestProposalsInsideSnapshot(t *testing.T) {
	var w pending
	inside, at, later, over := &Proposal{}, &Proposal{}, &Proposal{}, &Proposal{}
	w.add(EntryID{5, 2}, []*Proposal{inside})
	w.add(EntryID{9, 2}, []*Proposal{at, later})
	w.add(EntryID{12, 1}, []*Proposal{over})
	early := &appliedWait{index: 8, done: make(chan struct{})}
	late := &appliedWait{index: 11, done: make(chan struct{})}
	w.wait(early)
	w.wait(late)
	settled, woken := w.jump(EntryID{9, 2})
	if len(settled) != 3 || settled[0] != inside || settled[1] != at || settled[2] != over || len(woken) != 1 || woken[0] != early.done {
		t.Fatalf("settled %v, woken %v", settled, woken)
	}
	if !errors.Is(inside.err, ErrOutcomeUnknown) || !errors.Is(at.err, ErrOutcomeUnknown) || !errors.Is(over.err, ErrSuperseded) {
		t.Errorf("told %v, %v and %v", inside.err, at.err, over.err)
	}
	more := &Proposal{}
	if settled, _ := w.add(EntryID{7, 2}, []*Proposal{more}); len(settled) != 1 || !errors.Is(more.err, ErrOutcomeUnknown) {
		t.Errorf("the leader's answer comes after the snapshot: %v", more.err)
	}
	settled, woken = w.onApplied(sealed(10, 2, "x", "y"), outcomes{data: [][]byte{[]byte("r"), nil}}, nil, nil)
	if len(settled) != 1 || settled[0] != later || later.err != nil || string(later.result.Data) != "r" || len(woken) != 1 || woken[0] != late.done {
		t.Errorf("settled %v, told %+v and %v", settled, later.result, later.err)
	}
}

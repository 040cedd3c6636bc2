package raft

import (
	"slices"
	"testing"
	"time"
)

// These tests hold core against "In Search of an Understandable Consensus
// Algorithm (Extended Version)": Figure 2 line by line, then sections 5 and 8
// claim by claim. A comment names the claim; where the library differs from
// it, it says how. What a claim says about several servers at once is told in
// testdata/scripts too.

// restarted is testCore after a restart: its log holds entry 1 and, from entry
// 2 on, no-ops of these terms.
func restarted(t *testing.T, id memberID, n int, hard HardState, terms ...Term) *core {
	t.Helper()
	c := testCore(t, id, n)
	rec := Recovered{HardState: hard, Last: 1, Runs: []EntryID{{1, 0}}, Tail: c.log.tail}
	for _, term := range terms {
		rec.Last++
		if last := rec.Runs[len(rec.Runs)-1].Term; term != last {
			rec.Runs = append(rec.Runs, EntryID{rec.Last, term})
		}
		rec.Tail = append(rec.Tail, makeEntry(entryNoop, EntryID{rec.Last, term}, simEpoch, nil))
	}
	return newCore(id, c.limits, rec, c.configuration, c.rng, simEpoch)
}

// appendFrom is an AppendEntries of the leader, member 2, with no-ops of these terms.
func appendFrom(term Term, prev EntryID, commit Index, terms ...Term) *appendArgs {
	a := &appendArgs{Term: term, Leader: 2, Seq: 1, Prev: prev, Commit: commit}
	for i, entry := range terms {
		a.Entries = append(a.Entries, makeEntry(entryNoop, EntryID{prev.Index + 1 + Index(i), entry}, simEpoch, nil))
	}
	return a
}

// hear hands c an AppendEntries and returns its answer.
func hear(t *testing.T, c *core, a *appendArgs) *appendReply {
	t.Helper()
	c.onAppendRequest(a, "token")
	for _, m := range persist(t, c) {
		if m.appendReply != nil {
			return m.appendReply
		}
	}
	t.Fatal("no answer")
	return nil
}

// askVote hands c a RequestVote and returns its answer.
func askVote(t *testing.T, c *core, candidate memberID, term Term, last EntryID) *voteReply {
	t.Helper()
	return answerVote(t, c, &voteArgs{Term: term, Candidate: candidate, Last: last})
}

func answerVote(t *testing.T, c *core, a *voteArgs) *voteReply {
	t.Helper()
	c.onVoteRequest(a, "token")
	for _, m := range persist(t, c) {
		if m.voteReply != nil {
			return m.voteReply
		}
	}
	t.Fatal("no answer")
	return nil
}

// campaignNow lets the election timer of c run out.
func campaignNow(t *testing.T, c *core) (sent []message) {
	t.Helper()
	c.now = c.electionDeadline
	c.tick()
	return persist(t, c)
}

func votesAsked(sent []message) (out []*voteArgs) {
	for _, m := range sent {
		if m.vote != nil {
			out = append(out, m.vote)
		}
	}
	return out
}

func logTerms(c *core) []Term { return (&testNode{core: c}).terms() }

func wantLog(t *testing.T, c *core, want ...Term) {
	t.Helper()
	if got := logTerms(c); !slices.Equal(got, want) {
		t.Errorf("log has terms %v, want %v", got, want)
	}
}

func wantState(t *testing.T, c *core, role Role, term Term, vote memberID) {
	t.Helper()
	if c.role != role || c.currentTerm != term || c.votedFor != vote {
		t.Errorf("%v of term %d that voted for %d, want %v of term %d that voted for %d", c.role, c.currentTerm, c.votedFor, role, term, vote)
	}
}

// --- Figure 2, State ---

// currentTerm: the latest term seen, 0 at first boot, never decreasing.
func TestPaperFig2_CurrentTerm(t *testing.T) {
	c := testCore(t, 1, 3)
	wantState(t, c, Follower, 0, 0)
	for _, step := range []struct{ seen, want Term }{{3, 3}, {1, 3}, {5, 5}, {4, 5}} {
		askVote(t, c, 2, step.seen, EntryID{1, 0})
		if c.currentTerm != step.want {
			t.Errorf("term is %d after hearing of %d, want %d", c.currentTerm, step.seen, step.want)
		}
	}
}

// votedFor: who got the vote in the current term, nobody at first. It changes
// only with the term.
func TestPaperFig2_VotedFor(t *testing.T) {
	c := testCore(t, 1, 5)
	askVote(t, c, 2, 1, EntryID{1, 0})
	wantState(t, c, Follower, 1, 2)
	hear(t, c, appendFrom(1, EntryID{1, 0}, 0, 1)) // a leader of this term does not free the vote
	wantState(t, c, Follower, 1, 2)
	hear(t, c, appendFrom(2, EntryID{2, 1}, 0)) // one of a new term does
	wantState(t, c, Follower, 2, 0)
}

// Persistent state is updated on stable storage before responding to RPCs:
// a vote, an acknowledgement and even a refusal wait for what they state.
func TestPaperFig2_PersistentBeforeResponding(t *testing.T) {
	for name, request := range map[string]func(*core){
		"vote":            func(c *core) { c.onVoteRequest(&voteArgs{Term: 1, Candidate: 2, Last: EntryID{1, 0}}, "token") },
		"refused vote":    func(c *core) { c.onVoteRequest(&voteArgs{Term: 1, Candidate: 2}, "token") },
		"acknowledgement": func(c *core) { c.onAppendRequest(appendFrom(1, EntryID{1, 0}, 0, 1), "token") },
		"refused append":  func(c *core) { c.onAppendRequest(appendFrom(1, EntryID{5, 1}, 0), "token") },
		"heartbeat": func(c *core) {
			c.onAppendRequest(&appendArgs{Term: 1, Leader: 2, Heartbeat: true}, "token")
		},
	} {
		c := testCore(t, 1, 3)
		var box outbox
		request(c)
		out := c.finish()
		box.add(out.msgs)
		if early := box.release(nil, c.durableLSN, c.currentTerm, c.hardLSN); len(early) != 0 {
			t.Errorf("%s: the answer left before its state was durable", name)
		}
		if out.save == nil || out.save.HardState == nil || out.save.HardState.Term != 1 {
			t.Fatalf("%s: saves %+v", name, out.save)
		}
		c.persisted(out.save.LSN, 0)
		if late := box.release(nil, c.durableLSN, c.currentTerm, c.hardLSN); len(late) != 1 {
			t.Errorf("%s: %d answers left once it was", name, len(late))
		}
	}
}

// Term, vote and log survive a restart; what is volatile does not.
func TestPaperFig2_StateSurvivesRestart(t *testing.T) {
	tc := newTestCluster(t, "a", "b", "c")
	a, b := tc.node("a"), tc.node("b")
	tc.elect(a)
	tc.settle()
	tc.step(a, (*core).heartbeat)
	tc.settle()
	if a.core.commitIndex != 2 || b.core.commitIndex != 2 {
		t.Fatalf("commit indexes are %d and %d", a.core.commitIndex, b.core.commitIndex)
	}
	for _, n := range []*testNode{a, b} {
		tc.crash(n)
		tc.boot(n)
		wantState(t, n.core, Follower, 1, 1)
		wantLog(t, n.core, 0, 1)
		if n.core.commitIndex != 0 || n.core.leader != 0 || len(n.core.progress) != 0 {
			t.Errorf("%s remembers commit index %d, leader %d, %d progresses", n.name, n.core.commitIndex, n.core.leader, len(n.core.progress))
		}
	}
}

// log[]: each entry holds a command and the term in which its leader received
// it; the first index is 1, which here is the cluster's configuration.
func TestPaperFig2_LogEntries(t *testing.T) {
	c := testCore(t, 1, 1)
	if e, ok := c.log.from(1, 1, 1); !ok || e[0].First() != 1 || e[0].kind(0) != entryConfiguration {
		t.Errorf("entry 1 is %+v", e)
	}
	elect(t, c)
	proposeOne(t, c, "x")
	e, ok := c.log.from(3, 3, 1)
	if !ok || e[0].kind(0) != entryCommand {
		t.Fatalf("entry 3 is %+v", e)
	}
	if got := e[0].entry(0); got.Index != 3 || got.Term != 1 || string(got.Data) != "x" {
		t.Errorf("entry 3 is %+v", got)
	}
}

// commitIndex: 0 at first, never decreasing.
func TestPaperFig2_CommitIndex(t *testing.T) {
	c := restarted(t, 1, 3, HardState{Term: 1}, 1, 1, 1)
	if c.commitIndex != 0 {
		t.Errorf("commit index is %d at first", c.commitIndex)
	}
	for _, step := range []struct{ leader, want Index }{{3, 3}, {1, 3}, {0, 3}, {4, 4}} {
		hear(t, c, appendFrom(1, EntryID{4, 1}, step.leader))
		if c.commitIndex != step.want {
			t.Errorf("commit index is %d after leaderCommit %d, want %d", c.commitIndex, step.leader, step.want)
		}
	}
}

// recordingMachine notes what it is given.
type recordingMachine struct{ applied []Index }

func (m *recordingMachine) Apply(e Entry) []byte {
	m.applied = append(m.applied, e.Index)
	return append([]byte("did "), e.Data...)
}

// lastApplied, and "All Servers": entries are applied once commitIndex has
// passed them, each once, in order. "Leaders": the answer to a command comes
// after it was applied. No-ops and configurations are not given to the machine.
func TestPaperFig2_LastApplied(t *testing.T) {
	c := testCore(t, 1, 3)
	sent := elect(t, c)
	cm := newConsensusModule(nil, c, &Config{MaxQueueBytes: 1 << 20}, &eventLog{})
	defer cm.sealTimer.Stop()
	machine := &recordingMachine{}
	a := newApplier(cm, machine)
	applyAll := func() {
		for run, ok := a.next(); ok; run, ok = a.next() {
			results, err := a.apply(run)
			if err != nil {
				t.Fatal(err)
			}
			cm.pending.onApplied(run, results, nil, nil)
		}
	}
	var proposals []*Proposal
	for _, data := range []string{"x", "y"} {
		p := &Proposal{done: make(chan struct{})}
		sent = append(sent, proposeOne(t, c, data)...)
		cm.pending.add(c.log.lastID(), []*Proposal{p})
		proposals = append(proposals, p)
	}
	if applyAll(); len(machine.applied) != 0 || cm.pending.applied != 0 || proposals[0].result.Index != 0 {
		t.Errorf("applied %v before anything was committed", machine.applied)
	}
	for i, want := range [][]Index{nil, {3}, {3, 4}} {
		ack(c, 2, &appendArgs{Term: 1, Leader: 1, Seq: uint64(i + 1), Prev: EntryID{Index(i + 2), 1}})
		persist(t, c)
		if applyAll(); !slices.Equal(machine.applied, want) || cm.pending.applied != c.commitIndex {
			t.Errorf("applied %v up to %d, want %v up to %d", machine.applied, cm.pending.applied, want, c.commitIndex)
		}
	}
	if r := proposals[1].result; r.Index != 4 || string(r.Data) != "did y" {
		t.Errorf("the proposal's result is %+v", r)
	}
}

// nextIndex begins just after the leader's last entry, matchIndex at 0, both
// anew at each election.
func TestPaperFig2_NextAndMatchIndex(t *testing.T) {
	c := restarted(t, 1, 3, HardState{Term: 1}, 1, 1)
	for term := Term(2); term <= 3; term++ {
		last := c.log.last
		for _, a := range votesAsked(campaignNow(t, c)) {
			c.onVoteReply(2, a, &voteReply{Term: term, Granted: true})
		}
		for _, p := range c.progress {
			if p.next != last+1 || p.match != 0 {
				t.Errorf("term %d: next %d, match %d of member %d, want %d and 0", term, p.next, p.match, p.id, last+1)
			}
		}
		for _, a := range appendsTo(2, persist(t, c)) {
			ack(c, 2, a)
		}
		if p := c.progressOf(2); p.match != last+1 || p.next != last+2 {
			t.Errorf("term %d: next %d, match %d after an acknowledgement of %d", term, p.next, p.match, last+1)
		}
		persist(t, c)
		c.now = c.now.Add(time.Minute) // nobody answers any more: it steps down
		c.tick()
		persist(t, c)
	}
}

// --- Figure 2, AppendEntries RPC ---

// 1. Reply false if term < currentTerm. Nothing else happens then.
func TestPaperFig2_AppendEntries1_StaleTerm(t *testing.T) {
	c := restarted(t, 1, 3, HardState{Term: 4}, 1, 1)
	before := c.electionDeadline
	r := hear(t, c, appendFrom(3, EntryID{3, 1}, 3, 3))
	if r.Success || r.Term != 4 {
		t.Errorf("answer is %+v, want a refusal with term 4", r)
	}
	wantLog(t, c, 0, 1, 1)
	if c.commitIndex != 0 || c.leader != 0 || c.electionDeadline != before {
		t.Errorf("commit index %d, leader %d, deadline moved by %v", c.commitIndex, c.leader, c.electionDeadline.Sub(before))
	}
}

// 2. Reply false if the log has no entry at prevLogIndex with prevLogTerm.
func TestPaperFig2_AppendEntries2_NoMatchingPrevious(t *testing.T) {
	for _, v := range []struct {
		prev EntryID
		want bool
	}{
		{EntryID{0, 0}, true}, {EntryID{1, 0}, true}, {EntryID{2, 1}, true}, {EntryID{3, 3}, true},
		{EntryID{3, 2}, false}, {EntryID{3, 4}, false}, {EntryID{2, 3}, false}, {EntryID{4, 3}, false}, {EntryID{9, 9}, false}, {EntryID{1, 1}, false},
	} {
		c := restarted(t, 1, 3, HardState{Term: 9}, 1, 3)
		if r := hear(t, c, appendFrom(9, v.prev, 9)); r.Success != v.want || r.Term != 9 {
			t.Errorf("after %v: %+v, want success %v", v.prev, r, v.want)
		} else if !r.Success && c.commitIndex != 0 {
			t.Errorf("after %v: refused, but the commit index is %d", v.prev, c.commitIndex)
		}
		wantLog(t, c, 0, 1, 3)
	}
}

// 3. If an existing entry conflicts with a new one, delete it and all that
// follow it.
func TestPaperFig2_AppendEntries3_Conflict(t *testing.T) {
	c := restarted(t, 1, 3, HardState{Term: 3}, 1, 2, 2, 2, 2)
	if r := hear(t, c, appendFrom(4, EntryID{2, 1}, 0, 2, 3)); !r.Success {
		t.Fatalf("answer is %+v", r)
	}
	wantLog(t, c, 0, 1, 2, 3)
}

// 4. Append any new entries not already in the log: what is there is neither
// appended twice nor removed, however late or short the request is.
func TestPaperFig2_AppendEntries4_OnlyNewEntries(t *testing.T) {
	for _, v := range []struct {
		a    *appendArgs
		want []Term
	}{
		{appendFrom(3, EntryID{3, 2}, 0, 3), []Term{0, 1, 2, 3}},
		{appendFrom(3, EntryID{1, 0}, 0, 1, 2, 3), []Term{0, 1, 2, 3}},
		{appendFrom(3, EntryID{1, 0}, 0, 1, 2), []Term{0, 1, 2}},
		{appendFrom(3, EntryID{1, 0}, 0, 1), []Term{0, 1, 2}},
		{appendFrom(3, EntryID{1, 0}, 0), []Term{0, 1, 2}},
		{appendFrom(3, EntryID{0, 0}, 0, 0), []Term{0, 1, 2}},
	} {
		c := restarted(t, 1, 3, HardState{Term: 3}, 1, 2)
		if r := hear(t, c, v.a); !r.Success {
			t.Errorf("after %v: %+v", v.a.Prev, r)
		}
		wantLog(t, c, v.want...)
		if c.log.truncations != 0 {
			t.Errorf("after %v: something was truncated", v.a.Prev)
		}
	}
}

// 5. commitIndex becomes min(leaderCommit, index of the last new entry): what
// this request has not verified may be another leader's.
func TestPaperFig2_AppendEntries5_CommitIndex(t *testing.T) {
	for _, v := range []struct {
		a    *appendArgs
		want Index
	}{
		{appendFrom(2, EntryID{2, 1}, 2), 2},
		{appendFrom(2, EntryID{2, 1}, 5), 2}, // entries 3 and 4 may conflict
		{appendFrom(2, EntryID{2, 1}, 5, 2), 3},
		{appendFrom(2, EntryID{2, 1}, 3, 2, 2), 3},
		{appendFrom(2, EntryID{1, 0}, 5, 1), 2},
		{appendFrom(2, EntryID{3, 2}, 5), 0}, // refused
	} {
		c := restarted(t, 1, 3, HardState{Term: 1}, 1, 1, 1)
		if hear(t, c, v.a); c.commitIndex != v.want {
			t.Errorf("after %v with %d entries, leaderCommit %d: commit index %d, want %d", v.a.Prev, len(v.a.Entries), v.a.Commit, c.commitIndex, v.want)
		}
	}
}

// Entries may be more than one, for efficiency, and none, as a heartbeat.
func TestPaperFig2_AppendEntries_ManyOrNone(t *testing.T) {
	c := testCore(t, 1, 3)
	c.limits.maxFrameBytes = 1 << 20
	sent := appendsTo(2, elect(t, c))
	var b entryBuilder
	for range 5 {
		b.add(entryCommand, []byte("x"))
	}
	c.propose(&b)
	persist(t, c)
	ack(c, 2, sent[0])
	if a := appendsTo(2, persist(t, c)); len(a) != 1 || a[0].lastIndex() != 7 {
		t.Errorf("sent %+v, want entries 3 to 7 in one request", a)
	}
	c.heartbeat()
	beats := 0
	for _, m := range persist(t, c) {
		if m.append != nil && m.append.Heartbeat && len(m.append.Entries) == 0 {
			beats++
		}
	}
	if beats != 2 {
		t.Errorf("%d heartbeats, want one for each follower", beats)
	}
}

// leaderId: so that the follower can redirect clients.
func TestPaperFig2_AppendEntries_LeaderID(t *testing.T) {
	c := testCore(t, 1, 3)
	hear(t, c, appendFrom(1, EntryID{1, 0}, 0))
	if c.leader != 2 || c.forwardTo != 2 {
		t.Errorf("leader is %d, proposals go to %d, want 2", c.leader, c.forwardTo)
	}
}

// --- Figure 2, RequestVote RPC ---

// 1. Reply false if term < currentTerm, with currentTerm for the candidate to
// update itself.
func TestPaperFig2_RequestVote1_StaleTerm(t *testing.T) {
	c := restarted(t, 1, 3, HardState{Term: 4}, 1)
	if r := askVote(t, c, 2, 3, EntryID{9, 3}); r.Granted || r.Term != 4 {
		t.Errorf("answer is %+v, want a refusal with term 4", r)
	}
	wantState(t, c, Follower, 4, 0)
}

// 2. Grant if votedFor is null or the candidate, and the candidate's log is at
// least as up-to-date as the receiver's.
func TestPaperFig2_RequestVote2_Grant(t *testing.T) {
	for _, v := range []struct {
		votedFor memberID
		last     EntryID
		want     bool
	}{
		{0, EntryID{3, 2}, true}, {2, EntryID{3, 2}, true}, {3, EntryID{3, 2}, false}, {1, EntryID{3, 2}, false},
		{0, EntryID{2, 2}, false}, {2, EntryID{2, 2}, false}, {0, EntryID{9, 1}, false}, {0, EntryID{2, 3}, true},
	} {
		c := restarted(t, 1, 5, HardState{Term: 3, VotedFor: uint64(v.votedFor)}, 1, 2)
		r := askVote(t, c, 2, 3, v.last)
		if r.Granted != v.want || r.Term != 3 {
			t.Errorf("voted for %d, asked with last entry %v: %+v, want granted %v", v.votedFor, v.last, r, v.want)
		}
		want := v.votedFor
		if v.want {
			want = 2
		}
		wantState(t, c, Follower, 3, want)
	}
}

// --- Figure 2, Rules for Servers: all servers ---

// If a request or response carries a term above currentTerm: adopt it and
// become a follower, whatever one is. The new term's vote is free.
func TestPaperFig2_AllServers_HigherTerm(t *testing.T) {
	messages := map[string]func(*core){
		"RequestVote":         func(c *core) { c.onVoteRequest(&voteArgs{Term: 7, Candidate: 2}, "token") },
		"answer to a vote":    func(c *core) { c.onVoteReply(2, &voteArgs{Term: 1}, &voteReply{Term: 7}) },
		"AppendEntries":       func(c *core) { c.onAppendRequest(appendFrom(7, EntryID{1, 0}, 0), "token") },
		"refused append":      func(c *core) { c.onAppendReply(2, &appendArgs{Term: 1}, &appendReply{Term: 7}) },
		"answer to heartbeat": func(c *core) { c.onAppendReply(2, &appendArgs{Term: 1, Heartbeat: true}, &appendReply{Term: 7}) },
	}
	for name, f := range messages {
		for _, role := range []Role{Follower, Candidate, Leader} {
			c := testCore(t, 1, 3)
			c.limits.checkQuorum = false // with it, a leader in contact refuses to look at a vote's term
			switch role {
			case Candidate:
				campaignNow(t, c)
			case Leader:
				elect(t, c)
			}
			if c.role != role {
				t.Fatalf("role is %v", c.role)
			}
			f(c)
			persist(t, c)
			if c.role != Follower || c.currentTerm != 7 || c.votedFor != 0 {
				t.Errorf("%s to a %v: %v of term %d that voted for %d", name, role, c.role, c.currentTerm, c.votedFor)
			}
		}
	}
}

// --- Figure 2, Rules for Servers: followers ---

// Respond to RPCs from candidates and leaders, each exactly once, and ask
// nothing by oneself (§5.1: followers are passive).
func TestPaperFig2_Followers_Respond(t *testing.T) {
	c := testCore(t, 1, 3)
	c.onVoteRequest(&voteArgs{Term: 1, Candidate: 2, Last: EntryID{1, 0}}, "first")
	c.onAppendRequest(appendFrom(1, EntryID{1, 0}, 0, 1), "second")
	c.onAppendRequest(&appendArgs{Term: 1, Leader: 2, Heartbeat: true}, "third")
	c.heartbeat()
	c.tick()
	var answered []any
	for _, m := range persist(t, c) {
		if m.to != 2 {
			t.Errorf("sent to member %d", m.to)
		}
		answered = append(answered, m.token)
	}
	if !slices.Equal(answered, []any{"first", "second", "third"}) {
		t.Errorf("answered %v", answered)
	}
}

// If the election timeout elapses without AppendEntries from the current leader
// or granting a vote: become a candidate. Not before.
func TestPaperFig2_Followers_Timeout(t *testing.T) {
	c := testCore(t, 1, 3)
	c.now = c.electionDeadline.Add(-1)
	c.tick()
	wantState(t, c, Follower, 0, 0)
	hear(t, c, appendFrom(1, EntryID{1, 0}, 0))
	if d := c.electionDeadline.Sub(c.now); d < c.limits.electionTimeout {
		t.Errorf("campaigns %v after hearing from the leader", d)
	}
	c.now = c.electionDeadline.Add(-1)
	askVote(t, c, 3, 2, EntryID{1, 0})
	if d := c.electionDeadline.Sub(c.now); d < c.limits.electionTimeout || c.votedFor != 3 {
		t.Errorf("campaigns %v after voting for %d", d, c.votedFor)
	}
	c.now = c.electionDeadline
	c.tick()
	wantState(t, c, Candidate, 3, 1)
}

// --- Figure 2, Rules for Servers: candidates ---

// On conversion: increment currentTerm, vote for self, reset the election
// timer, send RequestVote to all other servers.
func TestPaperFig2_Candidates_StartElection(t *testing.T) {
	c := restarted(t, 1, 5, HardState{Term: 3, VotedFor: 4}, 1, 2)
	sent := campaignNow(t, c)
	wantState(t, c, Candidate, 4, 1)
	if d := c.electionDeadline.Sub(c.now); d < c.limits.electionTimeout {
		t.Errorf("the election timer runs out in %v", d)
	}
	var asked []memberID
	for _, m := range sent {
		asked = append(asked, m.to)
		if want := (voteArgs{Term: 4, Candidate: 1, Last: EntryID{3, 2}}); m.vote == nil || *m.vote != want {
			t.Errorf("asked member %d for %+v, want %+v", m.to, m.vote, want)
		}
	}
	if !slices.Equal(asked, []memberID{2, 3, 4, 5}) {
		t.Errorf("asked %v", asked)
	}
}

// The own vote must not be forgotten either: nobody is asked before it is durable.
func TestPaperFig2_Candidates_OwnVoteFirst(t *testing.T) {
	c := testCore(t, 1, 3)
	c.now = c.electionDeadline
	c.tick()
	var box outbox
	out := c.finish()
	box.add(out.msgs)
	if early := box.release(nil, c.durableLSN, c.currentTerm, c.hardLSN); len(early) != 0 {
		t.Errorf("%d requests left before the own vote was durable", len(early))
	}
	if want := (HardState{Term: 1, VotedFor: 1}); out.save == nil || out.save.HardState == nil || *out.save.HardState != want {
		t.Errorf("saves %+v, want %+v", out.save, want)
	}
	c.persisted(c.lsn, 0)
	if late := box.release(nil, c.durableLSN, c.currentTerm, c.hardLSN); len(late) != 2 {
		t.Errorf("%d requests left once it was", len(late))
	}
}

// Votes received from a majority of servers: become leader. (§5.2: of the full
// cluster, for the same term, each server counting once.)
func TestPaperFig2_Candidates_Majority(t *testing.T) {
	for n, need := range map[int]int{1: 0, 2: 1, 3: 1, 4: 2, 5: 2, 6: 3, 7: 3} {
		c := testCore(t, 1, n)
		asked := votesAsked(campaignNow(t, c))
		for i := range need {
			if c.role != Candidate {
				t.Errorf("%d servers: %v with %d votes of others", n, c.role, i)
			}
			for range 3 { // the same vote again, and refusals, count nothing
				c.onVoteReply(memberID(n), asked[0], &voteReply{Term: 1})
				if i > 0 {
					c.onVoteReply(memberID(i+1), asked[0], &voteReply{Term: 1, Granted: true})
				}
			}
			if c.role != Candidate {
				t.Errorf("%d servers: %v with %d votes of others, some of them counted again", n, c.role, i)
			}
			c.onVoteReply(memberID(i+2), asked[0], &voteReply{Term: 1, Granted: true})
		}
		if c.role != Leader {
			t.Errorf("%d servers: %v with %d votes of others", n, c.role, need)
		}
	}
}

// AppendEntries received from the new leader: become follower. (§5.2: if its
// term is at least the candidate's; otherwise it is refused and the candidate
// stays one.)
func TestPaperFig2_Candidates_NewLeader(t *testing.T) {
	for leaderTerm, want := range map[Term]Role{3: Candidate, 4: Follower, 5: Follower} {
		c := restarted(t, 1, 3, HardState{Term: 3})
		asked := votesAsked(campaignNow(t, c))
		r := hear(t, c, appendFrom(leaderTerm, EntryID{1, 0}, 0))
		if c.role != want || r.Success != (want == Follower) {
			t.Errorf("leader of term %d: the candidate of term 4 is %v and answers %+v", leaderTerm, c.role, r)
		}
		if want == Follower {
			c.onVoteReply(3, asked[0], &voteReply{Term: 4, Granted: true})
			if c.role != Follower || c.leader != 2 {
				t.Errorf("a vote of the lost election makes it %v that follows %d", c.role, c.leader)
			}
		}
	}
}

// Election timeout elapses: start a new election.
func TestPaperFig2_Candidates_Timeout(t *testing.T) {
	c := testCore(t, 1, 3)
	for term := Term(1); term <= 3; term++ {
		asked := votesAsked(campaignNow(t, c))
		wantState(t, c, Candidate, term, 1)
		if len(asked) != 2 || asked[0].Term != term {
			t.Errorf("asked %+v in term %d", asked, term)
		}
	}
}

// --- Figure 2, Rules for Servers: leaders ---

// Upon election send AppendEntries to each server, and repeat it during idle
// periods. The first one is not empty here: it carries the no-op of §8.
func TestPaperFig2_Leaders_Heartbeats(t *testing.T) {
	c := testCore(t, 1, 5)
	sent := elect(t, c)
	for id := memberID(2); id <= 5; id++ {
		if a := appendsTo(id, sent); len(a) != 1 || a[0].Term != 1 || a[0].Prev != (EntryID{1, 0}) {
			t.Errorf("at the election member %d was sent %+v", id, a)
		}
	}
	for range 3 {
		c.now = c.now.Add(c.limits.heartbeatInterval)
		c.heartbeat()
		got := map[memberID]int{}
		for _, m := range persist(t, c) {
			if m.append != nil && m.append.Heartbeat && m.append.Term == 1 {
				got[m.to]++
				c.onAppendReply(m.to, m.append, &appendReply{Term: 1, Success: true})
			}
		}
		if len(got) != 4 || got[2] != 1 || got[5] != 1 {
			t.Errorf("heartbeats to %v", got)
		}
	}
}

// A command from a client is appended to the local log. (That it is answered
// after it was applied is in TestPaperFig2_LastApplied.)
func TestPaperFig2_Leaders_Command(t *testing.T) {
	c := testCore(t, 1, 3)
	elect(t, c)
	proposeOne(t, c, "x")
	wantLog(t, c, 0, 1, 1)
	if c.commitIndex != 0 {
		t.Errorf("commit index is %d while nobody else has the entry", c.commitIndex)
	}
}

// If the last log index is at least nextIndex for a follower: send the entries
// from nextIndex on.
func TestPaperFig2_Leaders_SendFromNextIndex(t *testing.T) {
	c := testCore(t, 1, 3)
	first := appendsTo(2, elect(t, c))[0]
	ack(c, 2, first)
	persist(t, c)
	if p := c.progressOf(2); p.next != 3 {
		t.Fatalf("next is %d", p.next)
	}
	a := appendsTo(2, proposeOne(t, c, "x"))
	if len(a) != 1 || a[0].Prev != (EntryID{2, 1}) || len(a[0].Entries) != 1 || a[0].Entries[0].First() != 3 {
		t.Errorf("sent %+v, want entry 3 after entry 2", a)
	}
	// The other one has not answered: its request is not repeated at once.
	if a := appendsTo(3, persist(t, c)); len(a) != 0 {
		t.Errorf("sent %+v to a follower that is being asked", a)
	}
}

// Success: update nextIndex and matchIndex.
func TestPaperFig2_Leaders_Success(t *testing.T) {
	c := testCore(t, 1, 3)
	c.limits.maxFrameBytes = 1 << 20
	first := appendsTo(2, elect(t, c))[0]
	proposeOne(t, c, "x")
	proposeOne(t, c, "y")
	ack(c, 2, first)
	if p := c.progressOf(2); p.match != 2 || p.next != 3 {
		t.Errorf("match %d, next %d after an acknowledgement of 2", p.match, p.next)
	}
	second := appendsTo(2, persist(t, c))[0]
	ack(c, 2, second)
	if p := c.progressOf(2); p.match != 4 || p.next != 5 {
		t.Errorf("match %d, next %d after an acknowledgement of 4", p.match, p.next)
	}
}

// Failure because of inconsistency: nextIndex goes back, and the request is
// repeated. (§5.3: by as many entries as the answer's hint allows.)
func TestPaperFig2_Leaders_Inconsistency(t *testing.T) {
	c := restarted(t, 1, 3, HardState{Term: 3}, 1, 1, 2, 3)
	first := appendsTo(2, elect(t, c))[0]
	if first.Prev != (EntryID{5, 3}) {
		t.Fatalf("probes after %v", first.Prev)
	}
	c.onAppendReply(2, first, &appendReply{Term: 4, Hint: EntryID{3, 1}})
	a := appendsTo(2, persist(t, c))
	if len(a) != 1 || a[0].Prev != (EntryID{3, 1}) {
		t.Fatalf("after the refusal sent %+v, want a probe after entry 3", a)
	}
	c.onAppendReply(2, a[0], &appendReply{Term: 4, Hint: EntryID{1, 0}})
	if a = appendsTo(2, persist(t, c)); len(a) != 1 || a[0].Prev != (EntryID{1, 0}) {
		t.Errorf("after the second refusal sent %+v, want a probe after entry 1", a)
	}
}

// If there is an N > commitIndex that a majority's matchIndex reaches and
// log[N] is of the current term: commitIndex becomes N.
func TestPaperFig2_Leaders_Commit(t *testing.T) {
	for _, v := range []struct {
		matches []Index // of members 2 to 5
		want    Index
	}{
		{[]Index{0, 0, 0, 0}, 0},
		{[]Index{6, 0, 0, 0}, 0},
		{[]Index{6, 6, 0, 0}, 6},
		{[]Index{6, 5, 0, 0}, 5},
		{[]Index{4, 4, 4, 4}, 0}, // an earlier term's entry, on every server
		{[]Index{0, 5, 4, 6}, 5}, // the second highest of the others
		{[]Index{3, 3, 6, 0}, 0}, // two have 6
		{[]Index{6, 6, 6, 6}, 6},
		{[]Index{5, 5, 0, 0}, 5}, // with all before it, of whatever term
		{[]Index{6, 4, 4, 4}, 0},
	} {
		c := restarted(t, 1, 5, HardState{Term: 2}, 1, 1, 2) // entries 2 to 4
		elect(t, c)                                          // entry 5, of term 3
		proposeOne(t, c, "x")                                // entry 6
		for i, match := range v.matches {
			if match > 0 {
				term, _ := c.log.term(match)
				ack(c, memberID(i+2), &appendArgs{Term: 3, Leader: 1, Seq: 1, Prev: EntryID{match, term}})
			}
		}
		persist(t, c)
		if c.commitIndex != v.want {
			t.Errorf("matches %v: commit index %d, want %d", v.matches, c.commitIndex, v.want)
		}
	}
}

// The leader is one of the majority with what its disk has, not with what it
// has appended.
func TestPaperFig2_Leaders_CommitNeedsOwnDisk(t *testing.T) {
	c := testCore(t, 1, 3)
	sent := elect(t, c)
	ack(c, 2, appendsTo(2, sent)[0])
	persist(t, c)
	var b entryBuilder
	b.add(entryCommand, []byte("x"))
	c.propose(&b)
	out := c.finish()
	for _, a := range appendsTo(2, out.msgs) {
		ack(c, 2, a)
	}
	if c.finish(); c.commitIndex != 2 {
		t.Errorf("commit index is %d: entry 3 is on one disk of three", c.commitIndex)
	}
	if c.persisted(out.save.LSN, 0); c.commitIndex != 3 {
		t.Errorf("commit index is %d once the own disk has it", c.commitIndex)
	}
}

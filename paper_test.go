package raft

import (
	"context"
	"math/bits"
	"math/rand/v2"
	"slices"
	"strings"
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
type recordingMachine struct {
	noSnapshots
	applied []Index
}

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
	machine := &recordingMachine{}
	conf := Config{MaxQueueBytes: 1 << 20, StateMachine: machine}
	cm := newConsensusModule(nil, c, &conf, &eventLog{})
	defer cm.sealTimer.Stop()
	a := newApplier(context.Background(), cm, &conf)
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
		loseQuorum(t, c)
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

// --- Figure 3 ---
// Every step of a testCluster checks all five properties; here are the
// situations that put them to the test.

// Election Safety: at most one leader per term, in whatever order two
// candidates reach the voters.
func TestPaperFig3_ElectionSafety(t *testing.T) {
	for order := range 8 {
		tc := newTestCluster(t, "a", "b", "c", "d", "e")
		a, b := tc.node("a"), tc.node("b")
		tc.timeout(a)
		tc.timeout(b)
		for i, voter := range []memberID{3, 4, 5} {
			first, second := a.id, b.id
			if order>>i&1 == 1 {
				first, second = second, first
			}
			tc.deliver(tc.take(tc.between(first, voter)[0]))
			tc.deliver(tc.take(tc.between(second, voter)[0]))
		}
		tc.settle()
		if len(tc.leaders) != 1 {
			t.Errorf("order %d: leaders are %v, want one", order, tc.leaders)
		}
	}
}

// Leader Append-Only: nothing that arrives makes a leader overwrite or delete
// entries of its log. (§5.3, §5.4.1: entries flow from leaders to followers.)
func TestPaperFig3_LeaderAppendOnly(t *testing.T) {
	c := restarted(t, 1, 3, HardState{Term: 2}, 1, 2)
	sent := elect(t, c)
	proposeOne(t, c, "x")
	want := []Term{0, 1, 2, 3, 3}
	for _, a := range []*appendArgs{appendFrom(2, EntryID{1, 0}, 3, 2, 2), appendFrom(1, EntryID{0, 0}, 0), appendFrom(2, EntryID{5, 2}, 0)} {
		if r := hear(t, c, a); r.Success || c.role != Leader {
			t.Errorf("a deposed leader's append after %v: %+v, %v", a.Prev, r, c.role)
		}
		wantLog(t, c, want...)
	}
	c.onAppendReply(2, appendsTo(2, sent)[0], &appendReply{Term: 3, Hint: EntryID{0, 0}})
	persist(t, c)
	wantLog(t, c, want...)
}

// Log Matching: if two logs have an entry with the same index and term, they
// are equal up to it. A follower with anything else in front refuses.
func TestPaperFig3_LogMatching(t *testing.T) {
	for _, f := range figure7 {
		tc := figure7Cluster(t, f.log)
		tc.elect(tc.node("leader"))
		tc.settle() // testCluster compares the logs after every step
		if l, f := tc.node("leader").terms(), tc.node("follower").terms(); !slices.Equal(l, f) {
			t.Errorf("the logs are %v and %v", l, f)
		}
	}
}

// --- §5.1, Raft basics ---

// Only the leader takes commands; the others say who it is.
func TestPaper51_OnlyLeaderTakesCommands(t *testing.T) {
	c := testCore(t, 1, 3)
	refuses := func() {
		t.Helper()
		var b entryBuilder
		b.add(entryCommand, []byte("x"))
		if id, ok := c.propose(&b); ok || c.log.last != 1 {
			t.Errorf("a %v appended entry %v", c.role, id)
		}
	}
	refuses()
	campaignNow(t, c)
	refuses()
	if c.onVoteReply(2, &voteArgs{Term: 1}, &voteReply{Term: 1, Granted: true}); c.role != Leader {
		t.Fatalf("role is %v", c.role)
	}
	proposeOne(t, c, "x")
}

// Terms are numbered with consecutive integers, each begins with an election,
// and one whose election nobody wins ends without a leader.
func TestPaper51_TermsAreConsecutive(t *testing.T) {
	tc := newTestCluster(t, "a", "b")
	a, b := tc.node("a"), tc.node("b")
	for term := Term(1); term <= 4; term++ {
		tc.now = tc.now.Add(time.Minute)
		tc.step(a, (*core).tick)
		tc.step(b, (*core).tick)
		tc.settle()
		wantState(t, a.core, Candidate, term, 1)
		wantState(t, b.core, Candidate, term, 2)
	}
	if len(tc.leaders) != 0 {
		t.Errorf("leaders are %v after split votes", tc.leaders)
	}
	tc.elect(a)
	wantState(t, a.core, Leader, 5, 1)
}

// Terms are exchanged whenever servers communicate: also a refusal brings the
// one that is behind up to date.
func TestPaper51_TermsAreExchanged(t *testing.T) {
	for _, late := range []Term{1, 6} {
		c := restarted(t, 1, 3, HardState{Term: late}, 1)
		if r := hear(t, c, appendFrom(4, EntryID{9, 4}, 0)); r.Term != max(late, 4) {
			t.Errorf("term %d heard from one of term 4: answers %+v", late, r)
		}
		c = restarted(t, 1, 3, HardState{Term: late}, 1)
		if r := askVote(t, c, 2, 4, EntryID{1, 0}); r.Term != max(late, 4) || r.Granted {
			t.Errorf("term %d asked by one of term 4: answers %+v", late, r)
		}
	}
}

// Requests that are not answered are repeated, and all servers are asked in
// parallel. (An append is repeated after an election timeout or when its
// connection breaks; votes are asked for anew, in the next term.)
func TestPaper51_RequestsAreRepeated(t *testing.T) {
	c := testCore(t, 1, 3)
	c.limits.checkQuorum = false
	first := appendsTo(2, elect(t, c))
	c.now = c.now.Add(c.limits.electionTimeout - 1)
	c.heartbeat()
	if again := appendsTo(2, persist(t, c)); len(again) != 0 {
		t.Errorf("repeated %+v too early", again)
	}
	c.now = c.now.Add(1)
	c.heartbeat()
	again := appendsTo(2, persist(t, c))
	if len(again) != 1 || again[0].Prev != first[0].Prev || again[0].lastIndex() != first[0].lastIndex() {
		t.Errorf("sent %+v, want %+v again", again, first)
	}
}

// --- §5.2, Leader election ---

// Servers start up as followers, also those that led before.
func TestPaper52_StartsAsFollower(t *testing.T) {
	wantState(t, testCore(t, 1, 3), Follower, 0, 0)
	wantState(t, restarted(t, 1, 3, HardState{Term: 4, VotedFor: 1}, 1, 4), Follower, 4, 1)
	wantState(t, testCore(t, 1, 1), Follower, 0, 0)
}

// A server remains a follower as long as it hears from a leader, which sends
// heartbeats to all followers to that end.
func TestPaper52_HeartbeatsPreventElections(t *testing.T) {
	tc := newTestCluster(t, "a", "b", "c")
	tc.elect(tc.node("a"))
	tc.run(time.Minute)
	if len(tc.leaders) != 1 || tc.node("a").core.role != Leader || tc.node("b").core.currentTerm != 1 {
		t.Errorf("leaders are %v", tc.leaders)
	}
	tc.crash(tc.node("a"))
	tc.run(4 * time.Second)
	if l := tc.leader(); l == nil {
		t.Error("nobody leads after the leader's crash")
	}
}

// A server votes for at most one candidate in a term, first come, first
// served, however often and by whomever it is asked.
func TestPaper52_FirstComeFirstServed(t *testing.T) {
	c := testCore(t, 1, 5)
	for i, v := range []struct {
		candidate memberID
		want      bool
	}{{3, true}, {2, false}, {3, true}, {4, false}, {3, true}} {
		if r := askVote(t, c, v.candidate, 1, EntryID{9, 0}); r.Granted != v.want {
			t.Errorf("request %d, by member %d: %+v, want granted %v", i, v.candidate, r, v.want)
		}
	}
}

// Votes count for the term in which they were asked for only.
func TestPaper52_VotesOfTheSameTerm(t *testing.T) {
	c := testCore(t, 1, 5)
	old := votesAsked(campaignNow(t, c))
	asked := votesAsked(campaignNow(t, c))
	c.onVoteReply(2, old[0], &voteReply{Term: 1, Granted: true})
	c.onVoteReply(3, old[1], &voteReply{Term: 1, Granted: true})
	wantState(t, c, Candidate, 2, 1)
	c.onVoteReply(2, asked[0], &voteReply{Term: 2, Granted: true})
	wantState(t, c, Candidate, 2, 1)
	c.onVoteReply(3, asked[1], &voteReply{Term: 2, Granted: true})
	wantState(t, c, Leader, 2, 1)
}

// Election timeouts are drawn at random from a fixed interval, here from T to
// 2T, and anew at the start of each election.
func TestPaper52_RandomizedTimeouts(t *testing.T) {
	c := testCore(t, 1, 3)
	timeout := c.limits.electionTimeout
	var quarters [4]int
	draw := func() {
		d := c.electionDeadline.Sub(c.now)
		if d < timeout || d >= 2*timeout {
			t.Fatalf("drew %v, want one from %v to %v", d, timeout, 2*timeout)
		}
		quarters[4*(d-timeout)/timeout]++
	}
	for range 200 {
		draw()
		campaignNow(t, c)
	}
	for range 200 {
		hear(t, c, appendFrom(c.currentTerm, EntryID{1, 0}, 0))
		draw()
	}
	for i, n := range quarters {
		if n < 50 {
			t.Errorf("%d of 400 draws are from quarter %d of the interval", n, i+1)
		}
	}
}

// Split votes are rare and resolved quickly: nodes that begin at one time have
// a leader within a few timeouts.
func TestPaper52_SplitVotesAreResolved(t *testing.T) {
	for seed := range uint64(20) {
		tc := newTestCluster(t, "a", "b", "c", "d", "e")
		for _, n := range tc.nodes {
			n.seed += seed * 100
			tc.crash(n)
			tc.boot(n)
		}
		tc.run(5 * time.Second)
		if tc.leader() == nil {
			t.Errorf("seed %d: no leader after five timeouts", seed)
		}
	}
}

// --- §5.3, Log replication ---

// A command is appended and sent to all other servers in parallel; once a
// majority has it, a slow follower delays nothing: one round of requests is
// enough.
func TestPaper53_OneRoundToAMajority(t *testing.T) {
	tc := newTestCluster(t, "a", "b", "c")
	a := tc.node("a")
	tc.elect(a)
	tc.settle()
	tc.propose(a, "x")
	for _, id := range []memberID{2, 3} {
		if sent := tc.between(1, id); len(sent) != 1 || sent[0].req.append.lastIndex() != 3 {
			t.Fatalf("%d messages to member %d", len(sent), id)
		}
	}
	tc.deliver(tc.take(tc.between(1, 2)[0]))
	tc.deliver(tc.take(tc.between(2, 1)[0]))
	if a.core.commitIndex != 3 {
		t.Errorf("commit index is %d after one follower's answer", a.core.commitIndex)
	}
}

// The leader repeats AppendEntries indefinitely, also after the entry is
// committed, until all followers have all entries.
func TestPaper53_RetriesUntilAllHaveAll(t *testing.T) {
	tc := newTestCluster(t, "a", "b", "c")
	a, c := tc.node("a"), tc.node("c")
	tc.elect(a)
	tc.settle()
	tc.crash(c)
	for range 30 {
		tc.propose(a, "x")
	}
	tc.run(time.Minute)
	if a.core.commitIndex != 32 || a.core.role != Leader {
		t.Fatalf("%v with commit index %d", a.core.role, a.core.commitIndex)
	}
	tc.boot(c)
	tc.run(2 * time.Second)
	if !slices.Equal(c.terms(), a.terms()) || c.core.commitIndex != 32 {
		t.Errorf("log %v with commit index %d", c.terms(), c.core.commitIndex)
	}
}

// Committing an entry commits all before it, those of earlier leaders
// included, and followers hear of it with the next AppendEntries or heartbeat.
func TestPaper53_CommitIndexReachesFollowers(t *testing.T) {
	for name, tell := range map[string]func(*testCluster, *testNode){
		"heartbeat":     func(tc *testCluster, a *testNode) { tc.step(a, (*core).heartbeat) },
		"AppendEntries": func(tc *testCluster, a *testNode) { tc.propose(a, "x") },
	} {
		tc := newTestCluster(t, "a", "b", "c")
		for _, n := range tc.nodes {
			tc.install(n, HardState{Term: 3}, 1, 1, 3)
		}
		a, b := tc.node("a"), tc.node("b")
		tc.elect(a)
		tc.settle()
		if a.core.commitIndex != 5 || b.core.commitIndex != 0 {
			t.Fatalf("commit indexes are %d and %d, want 5 and 0", a.core.commitIndex, b.core.commitIndex)
		}
		tell(tc, a)
		tc.settle()
		if b.core.commitIndex != 5 {
			t.Errorf("%s: the follower's commit index is %d", name, b.core.commitIndex)
		}
	}
}

// A leader creates at most one entry with an index in a term, and entries
// never change their position.
func TestPaper53_OneEntryPerIndex(t *testing.T) {
	c := testCore(t, 1, 1)
	elect(t, c)
	for i := Index(3); i < 20; i++ {
		var b entryBuilder
		b.add(entryCommand, []byte{byte(i)})
		first, ok := c.propose(&b)
		if persist(t, c); !ok || first != (EntryID{i, 1}) {
			t.Fatalf("proposed entry %v, want %d", first, i)
		}
	}
	for i := Index(3); i < 20; i++ {
		e, ok := c.log.from(i, i, 1)
		if !ok || e[0].entry(0).Index != i || e[0].data(0)[0] != byte(i) {
			t.Errorf("entry %d is %+v", i, e)
		}
	}
}

// figure7 is the figure's followers, as terms from the paper's index 1 on. An
// index here is one higher: entry 1 is the configuration.
var figure7Leader = []Term{1, 1, 1, 4, 4, 5, 5, 6, 6, 6}

var figure7 = []struct {
	name string
	log  []Term
	most int // requests that may be refused until the logs agree: one per term to skip
}{
	{"a", []Term{1, 1, 1, 4, 4, 5, 5, 6, 6}, 1},
	{"b", []Term{1, 1, 1, 4}, 1},
	{"c", []Term{1, 1, 1, 4, 4, 5, 5, 6, 6, 6, 6}, 0},
	{"d", []Term{1, 1, 1, 4, 4, 5, 5, 6, 6, 6, 7, 7}, 0},
	{"e", []Term{1, 1, 1, 4, 4, 4, 4}, 2},
	{"f", []Term{1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3}, 2},
}

// figure7Cluster is the leader to be, one follower of the figure, and a server
// whose vote it gets.
func figure7Cluster(t *testing.T, follower []Term) *testCluster {
	tc := newTestCluster(t, "leader", "follower", "voter")
	tc.install(tc.node("leader"), HardState{Term: 7}, figure7Leader...)
	tc.install(tc.node("follower"), HardState{Term: 7}, follower...)
	tc.install(tc.node("voter"), HardState{Term: 7})
	return tc
}

// Figure 7: a follower may lack entries, have extra ones, or both. The leader
// makes each of (a) to (f) like its own, backing up by terms.
func TestPaper53_Figure7(t *testing.T) {
	for _, v := range figure7 {
		t.Run(v.name, func(t *testing.T) {
			tc := figure7Cluster(t, v.log)
			leader, follower := tc.node("leader"), tc.node("follower")
			tc.elect(leader)
			refused := 0
			for len(tc.net) > 0 {
				m := tc.take(tc.net[0])
				if m.from == follower.id && m.reply != nil && m.reply.appendReply != nil && !m.reply.appendReply.Success {
					refused++
				}
				tc.deliver(m)
			}
			want := append(append([]Term{0}, figure7Leader...), 8)
			if got := follower.terms(); !slices.Equal(got, want) {
				t.Errorf("log is %v, want %v", got, want)
			}
			if !slices.Equal(leader.terms(), want) {
				t.Errorf("the leader's log became %v", leader.terms())
			}
			if refused > v.most {
				t.Errorf("%d requests were refused, want at most %d", refused, v.most)
			}
		})
	}
}

// The optimization: a refusal lets the leader skip all conflicting entries of a
// term, not one entry each time.
func TestPaper53_OneRefusalPerTerm(t *testing.T) {
	c := restarted(t, 1, 3, HardState{Term: 5}, 1, 1, 3, 3, 3, 3)
	r := hear(t, c, appendFrom(6, EntryID{7, 2}, 0))
	if r.Success || r.Hint != (EntryID{3, 1}) {
		t.Errorf("answers %+v: want entry 3, the newest that a log whose entry 7 is of term 2 can share", r)
	}
	r = hear(t, c, appendFrom(6, EntryID{12, 4}, 0))
	if r.Success || r.Hint != (EntryID{7, 3}) {
		t.Errorf("answers %+v: want entry 7, its last", r)
	}
	leader := restarted(t, 1, 3, HardState{Term: 5}, 1, 1, 2, 2, 2, 2)
	first := appendsTo(2, elect(t, leader))[0]
	leader.onAppendReply(2, first, &appendReply{Term: 6, Hint: EntryID{7, 1}})
	if a := appendsTo(2, persist(t, leader)); len(a) != 1 || a[0].Prev != (EntryID{3, 1}) {
		t.Errorf("after a hint of term 1 sent %+v, want a probe after its own last of term 1, entry 3", a)
	}
}

// Once AppendEntries succeeds, the follower's log equals the leader's up to
// there, and stays so for the rest of the term: nothing more is refused.
func TestPaper53_ConsistentForTheTerm(t *testing.T) {
	tc := figure7Cluster(t, figure7[5].log)
	leader := tc.node("leader")
	tc.elect(leader)
	tc.settle()
	tc.trace.Reset()
	for range 10 {
		tc.propose(leader, "x")
		tc.step(leader, (*core).heartbeat)
		tc.settle()
	}
	if strings.Contains(tc.trace.String(), "refused") {
		t.Error("a request was refused after one had succeeded")
	}
	if !slices.Equal(leader.terms(), tc.node("follower").terms()) {
		t.Errorf("logs are %v and %v", leader.terms(), tc.node("follower").terms())
	}
}

// --- §5.4, Safety ---

// §5.4.1: a voter refuses a candidate whose log is less up-to-date: the later
// last term decides, then the longer log.
func TestPaper541_UpToDate(t *testing.T) {
	for _, v := range []struct {
		own, candidate []Term
		want           bool
	}{
		{[]Term{1}, []Term{1}, true},
		{[]Term{1}, []Term{1, 1}, true},
		{[]Term{1, 1}, []Term{1}, false},
		{[]Term{1}, []Term{2}, true},
		{[]Term{1, 1, 1}, []Term{2}, true},
		{[]Term{2}, []Term{1, 1, 1}, false},
		{nil, nil, true},
		{nil, []Term{1}, true},
		{[]Term{1}, nil, false},
	} {
		c := restarted(t, 1, 3, HardState{Term: 2}, v.own...)
		other := restarted(t, 2, 3, HardState{Term: 2}, v.candidate...)
		a := votesAsked(campaignNow(t, other))[0]
		if r := answerVote(t, c, a); r.Granted != v.want || r.Term != 3 {
			t.Errorf("%v asked by %v: %+v, want granted %v", v.own, v.candidate, r, v.want)
		}
	}
}

// §5.4.1: so a server that lacks a committed entry can't be elected, however
// often it campaigns.
func TestPaper541_ElectionRestriction(t *testing.T) {
	tc := newTestCluster(t, "a", "b", "c")
	a, c := tc.node("a"), tc.node("c")
	tc.elect(a)
	tc.deliver(tc.take(tc.between(1, 2)[0])) // entry 2 reaches b, not c
	tc.deliver(tc.take(tc.between(2, 1)[0]))
	if a.core.commitIndex != 2 {
		t.Fatalf("commit index is %d", a.core.commitIndex)
	}
	tc.crash(a)
	for range 5 {
		tc.timeout(c)
		tc.settle()
		if c.core.role == Leader {
			t.Fatal("c leads without the committed entry 2")
		}
	}
	tc.elect(tc.node("b"))
	tc.settle()
	if !slices.Equal(c.terms(), tc.node("b").terms()) {
		t.Errorf("c's log is %v", c.terms())
	}
}

// §5.4.2: entries of earlier terms keep their term numbers when a later leader
// replicates them.
func TestPaper542_OldEntriesKeepTheirTerm(t *testing.T) {
	tc := newTestCluster(t, "a", "b", "c")
	tc.install(tc.node("a"), HardState{Term: 6}, 2, 2, 5)
	tc.elect(tc.node("a"))
	tc.settle()
	if got, want := tc.node("c").terms(), []Term{0, 2, 2, 5, 7}; !slices.Equal(got, want) {
		t.Errorf("c's log is %v, want %v", got, want)
	}
}

// §5.4.2, Figure 8: only entries of the leader's own term are committed by
// counting replicas. testdata/scripts/figure8.txt tells the whole figure.
func TestPaper542_Figure8(t *testing.T) {
	for _, ownTermOnMajority := range []bool{false, true} {
		tc := newTestCluster(t, "s1", "s2", "s3", "s4", "s5")
		s1, s5 := tc.node("s1"), tc.node("s5")
		s1.limits.maxFrameBytes = 1 // one entry per request
		tc.install(s1, HardState{Term: 3}, 1, 2)
		tc.install(tc.node("s2"), HardState{Term: 3}, 1, 2)
		tc.install(tc.node("s3"), HardState{Term: 2}, 1)
		tc.install(tc.node("s4"), HardState{Term: 3}, 1)
		tc.install(s5, HardState{Term: 3}, 1, 3)
		// (c): s1 leads again, in term 4, and brings entry 3 of term 2 to s3.
		tc.cut(1, 5)
		tc.elect(s1)
		tc.cut(1, 4)
		for _, id := range []memberID{2, 3, 3} {
			tc.deliver(tc.take(tc.between(1, id)[0]))
			tc.deliver(tc.take(tc.between(id, 1)[0]))
		}
		if s1.core.quorumMatch() != 3 || s1.core.commitIndex != 0 {
			t.Fatalf("a majority has %d, commit index is %d; want 3 and 0", s1.core.quorumMatch(), s1.core.commitIndex)
		}
		if ownTermOnMajority { // (e): and its own entry, too
			tc.settle()
			if s1.core.commitIndex != 4 {
				t.Fatalf("commit index is %d, want 4", s1.core.commitIndex)
			}
		}
		// (d): s1 crashes, and s5 campaigns until its term is high enough.
		tc.crash(s1)
		tc.net, tc.cuts = nil, nil
		for range 2 {
			tc.timeout(s5)
			tc.settle()
		}
		if led := s5.core.role == Leader; led == ownTermOnMajority {
			t.Errorf("entry of term 4 on a majority: %v; s5 leads: %v", ownTermOnMajority, led)
		}
	}
}

// §5.4.3, Figure 9: a leader of a later term was elected by at least one
// server that has any entry committed before, whichever majorities they were.
func TestPaper543_Figure9(t *testing.T) {
	won := 0
	for having := range 16 { // which of s2 to s5 get s1's entry, as a set
		for candidate := memberID(2); candidate <= 5; candidate++ {
			tc := newTestCluster(t, "s1", "s2", "s3", "s4", "s5")
			s1 := tc.node("s1")
			tc.elect(s1)
			for id := memberID(2); id <= 5; id++ {
				if m := tc.take(tc.between(1, id)[0]); having>>(id-2)&1 == 1 {
					tc.deliver(m)
				}
			}
			tc.settle()
			majority := bits.OnesCount(uint(having)) >= 2
			if committed := len(tc.committed) == 2; committed != majority {
				t.Fatalf("committed %d entries with followers %04b", len(tc.committed), having)
			}
			tc.crash(s1)
			c := tc.node(tc.name(candidate))
			tc.timeout(c)
			tc.settle()
			if c.core.role != Leader {
				continue
			}
			won++
			if majority && having>>(candidate-2)&1 == 0 {
				t.Errorf("s%d leads without the entry that %04b committed", candidate, having)
			}
		}
	}
	if won < 30 {
		t.Errorf("%d of 64 candidates won", won)
	}
}

// --- §5.5, Follower and candidate crashes ---

// A server that crashes after it did what a request says and before it
// answered receives the request again: that does no harm.
func TestPaper55_RequestsAreIdempotent(t *testing.T) {
	tc := newTestCluster(t, "a", "b", "c")
	a, b := tc.node("a"), tc.node("b")
	tc.timeout(a)
	vote := tc.between(1, 2)[0]
	for range 2 { // the answer to the first one is lost in b's crash
		tc.net = nil
		tc.crash(b)
		tc.boot(b)
		tc.deliver(vote)
		if r := tc.between(2, 1)[0].reply.voteReply; !r.Granted {
			t.Fatalf("answers %+v", r)
		}
	}
	tc.settle()
	appended := &testMessage{from: 1, to: 2, req: message{to: 2, append: appendOf(a, 2)}}
	for range 2 {
		tc.crash(b)
		tc.boot(b)
		tc.deliver(appended)
		wantLog(t, b.core, 0, 1)
		if r := tc.take(tc.between(2, 1)[0]).reply; !r.appendReply.Success || r.match != 2 {
			t.Errorf("answers %+v", r)
		}
	}
	if b.core.log.truncations != 0 {
		t.Error("the repeated request truncated the log")
	}
}

// appendOf is leader a's append of entries 2 to last.
func appendOf(a *testNode, last Index) *appendArgs {
	e, _ := a.core.log.from(2, last, 1<<20)
	return &appendArgs{Term: a.core.currentTerm, Leader: 1, Seq: 1, Prev: EntryID{1, 0}, Entries: e}
}

// --- §5.6, Timing and availability ---

// Safety does not depend on timing: whatever happens in whatever order, with
// clocks that jump, the properties of Figure 3 hold after every step.
func TestPaper56_SafetyWithoutTiming(t *testing.T) {
	elections, commits := 0, 0
	for seed := range uint64(30) {
		dice := rand.New(rand.NewPCG(seed, 56))
		tc := newTestCluster(t, "a", "b", "c", "d", "e")
		for range 400 {
			n := tc.nodes[dice.IntN(5)]
			switch k := dice.IntN(100); {
			case k < 70 && len(tc.net) > 0:
				m := tc.net[dice.IntN(len(tc.net))]
				if dice.IntN(10) > 0 {
					tc.take(m)
				}
				if dice.IntN(10) > 0 {
					tc.deliver(m)
				}
			case n.core == nil:
				tc.boot(n)
			case k < 80 && n.core.role == Leader:
				tc.propose(n, "x")
			case k < 86:
				tc.step(n, (*core).heartbeat)
			case k < 90:
				tc.timeout(n)
			case k < 92:
				tc.crash(n)
			case k < 94:
				n.slow = !n.slow
				tc.flush(n)
			case k < 97:
				tc.now = tc.now.Add(-time.Duration(dice.IntN(1000)) * time.Millisecond)
			}
		}
		elections, commits = elections+len(tc.leaders), commits+len(tc.committed)
	}
	if elections < 30 || commits < 60 {
		t.Errorf("%d elections and %d commits show little", elections, commits)
	}
}

// Availability: a majority that can talk makes progress, and less does not.
func TestPaper56_MajorityIsEnough(t *testing.T) {
	tc := newTestCluster(t, "a", "b", "c", "d", "e")
	tc.crash(tc.node("a"))
	tc.crash(tc.node("b"))
	tc.run(5 * time.Second)
	l := tc.leader()
	if l == nil || l.core.commitIndex < 2 {
		t.Fatal("three of five servers commit nothing")
	}
	for _, n := range tc.nodes {
		if n.core != nil && n != l {
			tc.crash(n)
			break
		}
	}
	tc.propose(l, "x")
	before := l.core.commitIndex
	tc.run(5 * time.Second)
	if tc.leader() != nil || l.core.commitIndex != before {
		t.Error("two of five servers go on")
	}
}

// --- §8, Client interaction ---
// Sessions (serial numbers) and reads come with ReadIndex and sessions.

// A server that does not lead names the most recent leader it has heard from,
// for clients to be sent there. Of a new term's leader it knows nothing at first.
func TestPaper8_RedirectToLeader(t *testing.T) {
	tc := newTestCluster(t, "a", "b", "c")
	a, b, c := tc.node("a"), tc.node("b"), tc.node("c")
	knows := func(when string, n *testNode, leader, forwardTo memberID) {
		t.Helper()
		if n.core.leader != leader || n.core.forwardTo != forwardTo {
			t.Errorf("%s: %s takes %d for the leader and forwards to %d, want %d and %d", when, n.name, n.core.leader, n.core.forwardTo, leader, forwardTo)
		}
	}
	knows("at first", b, 0, 0)
	tc.elect(a)
	knows("after its vote", b, 0, 0)
	knows("elected", a, 1, 0)
	tc.settle()
	knows("after an append", b, 1, 1)
	b.core.notLeading(1) // it could not be reached
	knows("after a failure", b, 1, 0)
	tc.step(a, (*core).heartbeat)
	tc.settle()
	knows("after a heartbeat", b, 1, 1)
	tc.elect(c)
	knows("in a new term", b, 0, 0)
	tc.settle()
	knows("after the new leader's append", b, 3, 3)
	knows("after the new leader's append", a, 3, 3)
}

// A leader commits a blank no-op at the start of its term: only then does it
// know which entries are committed.
func TestPaper8_NoopAtStartOfTerm(t *testing.T) {
	tc := newTestCluster(t, "a", "b", "c")
	for _, n := range tc.nodes {
		tc.install(n, HardState{Term: 1}, 1, 1)
	}
	a := tc.node("a")
	tc.elect(a)
	e, ok := a.core.log.from(4, 4, 1)
	if !ok || e[0].kind(0) != entryNoop || e[0].term(0) != 2 || a.core.log.last != 4 || a.core.firstOfTerm != 4 {
		t.Fatalf("entry 4 is %+v", e)
	}
	if a.core.commitIndex != 0 {
		t.Errorf("commit index is %d before the no-op is on a majority", a.core.commitIndex)
	}
	tc.settle()
	if a.core.commitIndex != 4 {
		t.Errorf("commit index is %d, want 4", a.core.commitIndex)
	}
}

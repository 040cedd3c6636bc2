package raft

import (
	"slices"
	"strings"
	"testing"
	"time"
)

// Situations that went wrong in real implementations, at the level of the core.

// --- Elections ---

// A vote of term T arrives while its candidate asks in term T+1: it counts
// nothing, and neither does a late yes to the pre-vote before.
func TestScenario_DelayedVote(t *testing.T) {
	for _, preVote := range []bool{false, true} {
		tc := newTestCluster(t, "a", "b", "c")
		a := tc.node("a")
		a.limits.preVote = preVote
		tc.crash(a)
		tc.boot(a)
		tc.timeout(a)
		if preVote { // b's opinion makes a ask for votes; c's comes late
			tc.deliver(tc.take(tc.between(1, 2)[0]))
			tc.deliver(tc.take(tc.between(1, 3)[0]))
			tc.deliver(tc.take(tc.between(2, 1)[0]))
		} else { // b's vote for term 1 comes late
			tc.deliver(tc.take(tc.between(1, 2)[0]))
			tc.timeout(a)
		}
		want := Term(2)
		if preVote {
			want = 1
		}
		wantState(t, a.core, Candidate, want, 1)
		for _, m := range append(tc.between(2, 1), tc.between(3, 1)...) {
			if !m.reply.voteReply.Granted {
				t.Fatalf("the late answer is %+v", m.reply.voteReply)
			}
			tc.deliver(m)
		}
		wantState(t, a.core, Candidate, want, 1)
		tc.settle()
		if a.core.role != Leader {
			t.Errorf("the votes of term %d do not elect", want)
		}
	}
}

// A crash between the own vote and the first request: either the vote is
// durable, and nobody else gets it in this term, or nobody was ever asked.
func TestScenario_CrashAfterOwnVote(t *testing.T) {
	for _, flushed := range []bool{false, true} {
		tc := newTestCluster(t, "a", "b", "c")
		a := tc.node("a")
		a.slow = true
		tc.timeout(a)
		if len(tc.net) != 0 {
			t.Fatal("asked before the own vote was durable")
		}
		want := memberID(2)
		if flushed {
			tc.flush(a)
			tc.net, want = nil, 1
		}
		tc.crash(a)
		a.slow = false
		tc.boot(a)
		tc.timeout(tc.node("b"))
		tc.deliver(tc.take(tc.between(2, 1)[0]))
		wantState(t, a.core, Follower, 1, want)
		if r := tc.between(1, 2)[0].reply.voteReply; r.Granted == flushed {
			t.Errorf("own vote flushed: %v; another candidate is told %+v", flushed, r)
		}
	}
}

// A crash between a voter's vote and its reply: the candidate may ask again,
// another one gets nothing.
func TestScenario_CrashBeforeVoteReply(t *testing.T) {
	tc := newTestCluster(t, "a", "b", "c")
	a, b, c := tc.node("a"), tc.node("b"), tc.node("c")
	tc.timeout(a)
	tc.timeout(b)
	fromA, fromB := tc.between(1, 3)[0], tc.between(2, 3)[0]
	tc.net = nil
	tc.deliver(fromA)
	tc.net = nil
	tc.crash(c)
	tc.boot(c)
	tc.deliver(fromB)
	tc.deliver(fromA)
	if r := tc.between(3, 2)[0].reply.voteReply; r.Granted {
		t.Error("c voted for a and, after a restart, for b")
	}
	tc.settle()
	wantState(t, a.core, Leader, 1, 1)
}

// Servers whose dice fall alike must not split the vote for ever.
func TestScenario_IdenticalSeeds(t *testing.T) {
	for n := 2; n <= 7; n++ {
		tc := newTestCluster(t, strings.Split("abcdefg", "")[:n]...)
		for _, node := range tc.nodes {
			node.seed = 7
			tc.crash(node)
			tc.boot(node)
		}
		tc.run(20 * time.Second)
		if tc.leader() == nil {
			t.Errorf("%d servers with the same dice have no leader after 20 timeouts", n)
		}
	}
}

// Only a vote that is granted and a valid leader reset the election timer: a
// server that anything else holds back may be the only one that can win.
func TestScenario_TimerReset(t *testing.T) {
	for name, v := range map[string]struct {
		request func(*core)
		resets  bool
	}{
		"vote granted":           {func(c *core) { c.onVoteRequest(&voteArgs{Term: 3, Candidate: 2, Last: EntryID{3, 1}}, "token") }, true},
		"same vote again":        {func(c *core) { c.onVoteRequest(&voteArgs{Term: 2, Candidate: 3, Last: EntryID{3, 1}}, "token") }, true},
		"own disk, slow":         {func(c *core) { c.persisted(1, c.limits.heartbeatInterval+1) }, true},
		"append":                 {func(c *core) { c.onAppendRequest(appendFrom(2, EntryID{3, 1}, 0, 2), "token") }, true},
		"append refused for log": {func(c *core) { c.onAppendRequest(appendFrom(2, EntryID{9, 2}, 0), "token") }, true},
		"heartbeat":              {func(c *core) { c.onAppendRequest(&appendArgs{Term: 2, Leader: 2, Heartbeat: true}, "token") }, true},

		"vote of an old term":   {func(c *core) { c.onVoteRequest(&voteArgs{Term: 1, Candidate: 2, Last: EntryID{3, 1}}, "token") }, false},
		"vote given to another": {func(c *core) { c.onVoteRequest(&voteArgs{Term: 2, Candidate: 2, Last: EntryID{3, 1}}, "token") }, false},
		"vote for a short log":  {func(c *core) { c.onVoteRequest(&voteArgs{Term: 3, Candidate: 2, Last: EntryID{2, 1}}, "token") }, false},
		"pre-vote granted": {func(c *core) {
			c.onVoteRequest(&voteArgs{Term: 3, Candidate: 2, Last: EntryID{3, 1}, PreVote: true}, "token")
		}, false},
		"pre-vote refused":    {func(c *core) { c.onVoteRequest(&voteArgs{Term: 3, Candidate: 2, PreVote: true}, "token") }, false},
		"deposed leader":      {func(c *core) { c.onAppendRequest(appendFrom(1, EntryID{3, 1}, 0), "token") }, false},
		"heartbeat of it":     {func(c *core) { c.onAppendRequest(&appendArgs{Term: 1, Leader: 2, Heartbeat: true}, "token") }, false},
		"answer to a vote":    {func(c *core) { c.onVoteReply(2, &voteArgs{Term: 1}, &voteReply{Term: 3}) }, false},
		"answer to an append": {func(c *core) { c.onAppendReply(2, &appendArgs{Term: 1}, &appendReply{Term: 3}) }, false},
		"own disk, quick":     {func(c *core) { c.persisted(1, 0) }, false},
	} {
		c := restarted(t, 1, 3, HardState{Term: 2, VotedFor: 3}, 1, 1)
		persist(t, c)
		before := c.electionDeadline
		c.now = before.Add(-time.Millisecond)
		v.request(c)
		persist(t, c)
		if moved := c.electionDeadline != before; moved != v.resets {
			t.Errorf("%s: the timer was reset: %v, want %v", name, moved, v.resets)
		}
	}
}

// A refused pre-vote carries the voter's term, so that a server that is behind
// catches up and its next question is not in vain.
func TestScenario_RefusedPreVoteCarriesTerm(t *testing.T) {
	tc := newTestCluster(t, "a", "b")
	a := tc.node("a")
	a.limits.preVote = true
	tc.install(a, HardState{Term: 1}, 1)
	tc.install(tc.node("b"), HardState{Term: 8})
	tc.timeout(a)
	tc.settle()
	wantState(t, a.core, Follower, 8, 0)
	tc.elect(a)
	wantState(t, a.core, Leader, 9, 1)
}

// Granting a pre-vote is an opinion: it changes nothing, not even when the
// leader was last heard from.
func TestScenario_GrantedPreVoteChangesNothing(t *testing.T) {
	c := restarted(t, 1, 3, HardState{Term: 2, VotedFor: 3}, 1)
	hear(t, c, appendFrom(2, EntryID{2, 1}, 0))
	c.now = c.now.Add(c.limits.electionTimeout)
	contact, before := c.lastContact, c.snapshot()
	ask := &voteArgs{Term: 3, Candidate: 3, Last: EntryID{2, 1}, PreVote: true}
	if r := answerVote(t, c, ask); !r.Granted || r.Term != 2 {
		t.Fatalf("answers %+v", r)
	}
	if c.lastContact != contact || c.snapshot() != before || c.leader != 2 {
		t.Errorf("was %+v, last contact %v; is %+v, %v", before, contact, c.snapshot(), c.lastContact)
	}
	if r := answerVote(t, c, &voteArgs{Term: 3, Candidate: 2, Last: EntryID{2, 1}, PreVote: true}); !r.Granted {
		t.Error("an opinion given to one server was refused to another")
	}
	hear(t, c, appendFrom(2, EntryID{2, 1}, 0))
	if r := answerVote(t, c, ask); r.Granted {
		t.Error("granted a pre-vote right after the leader was heard from")
	}
}

// A vote is refused without looking at its term while the leader is in contact,
// on the leader itself too; one that the leader asked for is not.
func TestScenario_LeaderInContactIsProtected(t *testing.T) {
	leader := testCore(t, 1, 3)
	elect(t, leader)
	follower := testCore(t, 1, 3)
	hear(t, follower, appendFrom(1, EntryID{1, 0}, 0))
	for _, c := range []*core{leader, follower} {
		for _, preVote := range []bool{false, true} {
			ask := &voteArgs{Term: 5, Candidate: 3, Last: EntryID{9, 4}, PreVote: preVote}
			if r := answerVote(t, c, ask); r.Granted || r.Term != 1 || c.currentTerm != 1 {
				t.Errorf("a %v answers %+v", c.role, r)
			}
		}
	}
	if r := answerVote(t, follower, &voteArgs{Term: 5, Candidate: 3, Last: EntryID{9, 4}, Transfer: true}); !r.Granted {
		t.Error("refused an election that the leader asked for")
	}
}

// A server that is no member deposes no leader, whatever it asks for, also where
// check-quorum is off. There a member does, by its term.
func TestScenario_StrangerDeposesNobody(t *testing.T) {
	for _, checkQuorum := range []bool{true, false} {
		c := testCore(t, 1, 3)
		c.limits.checkQuorum = checkQuorum
		elect(t, c)
		for _, ask := range []voteArgs{{}, {PreVote: true}, {Transfer: true}} {
			ask.Term, ask.Candidate, ask.Last = 5, 99, EntryID{9, 4}
			if r := answerVote(t, c, &ask); r.Granted || c.role != Leader || c.currentTerm != 1 {
				t.Errorf("check-quorum %v: %+v is answered %+v by a %v of term %d", checkQuorum, ask, r, c.role, c.currentTerm)
			}
		}
		r := answerVote(t, c, &voteArgs{Term: 5, Candidate: 3, Last: EntryID{9, 4}})
		if r.Granted == checkQuorum || (c.role == Leader) != checkQuorum {
			t.Errorf("check-quorum %v: a member is answered %+v by a %v", checkQuorum, r, c.role)
		}
	}
}

// A leader that has closed its connections is protected no more, by those who
// saw it: they ask for pre-votes one after the other, without waiting. Whoever
// still has a connection refuses, and a message of the leader ends it.
func TestScenario_LeaderLeft(t *testing.T) {
	const leader = 2
	follower := func(id memberID) *core {
		c := testCore(t, id, 4)
		c.limits.preVote = true
		c.now = c.now.Add(time.Minute)
		hear(t, c, appendFrom(1, EntryID{1, 0}, 0))
		return c
	}
	for id, turn := range map[memberID]time.Duration{1: time.Second / 8, 3: time.Second / 4, 4: time.Second * 3 / 8} {
		c := follower(id)
		ask := &voteArgs{Term: 2, Candidate: 1, Last: EntryID{9, 1}, PreVote: true} // another follower
		if id == 1 {
			ask.Candidate = 3
		}
		before := c.electionDeadline
		c.leaderLeft(ask.Candidate)
		if !c.electionDeadline.Equal(before) || answerVote(t, c, ask).Granted {
			t.Errorf("member %d gives its leader up because another server has left", id)
		}
		c.leaderLeft(leader)
		if !answerVote(t, c, ask).Granted {
			t.Errorf("member %d protects a leader that has left", id)
		}
		if got := c.electionDeadline.Sub(c.now); got != turn {
			t.Errorf("member %d asks for pre-votes after %v, want %v", id, got, turn)
		}
		hear(t, c, appendFrom(1, EntryID{1, 0}, 0))
		if got := c.electionDeadline.Sub(c.now); got < time.Second || answerVote(t, c, ask).Granted {
			t.Errorf("member %d campaigns in %v although the leader is back", id, got)
		}
		c.leaderLeft(leader)
		c.now = c.electionDeadline
		c.tick()
		if sent := persist(t, c); c.currentTerm != 1 || len(sent) != 3 || !sent[0].vote.PreVote {
			t.Errorf("member %d is in term %d and sends %d requests; want three for pre-votes", id, c.currentTerm, len(sent))
		}
	}
	c := follower(1)
	c.limits.preVote = false // a guess must not raise the term
	before := c.electionDeadline
	if c.leaderLeft(leader); !c.electionDeadline.Equal(before) {
		t.Error("campaigns at once without pre-votes")
	}
}

// Pre-vote and check-quorum differ from server to server during a rolling
// upgrade: every mixture elects a leader, replaces one that crashes, and takes
// back a server that was cut off and campaigned.
func TestScenario_MixedSettings(t *testing.T) {
	modes := []limits{{preVote: true, checkQuorum: true}, {checkQuorum: true}, {}} // those that Validate lets through
	for mixture := range 27 {
		tc := newTestCluster(t, "a", "b", "c")
		for i, n := range tc.nodes {
			m := modes[[]int{mixture % 3, mixture / 3 % 3, mixture / 9}[i]]
			n.limits.preVote, n.limits.checkQuorum = m.preVote, m.checkQuorum
			tc.crash(n)
			tc.boot(n)
		}
		progress := func(what string) *testNode {
			t.Helper()
			before := len(tc.committed)
			tc.run(6 * time.Second)
			l := tc.leader()
			if l == nil {
				t.Fatalf("mixture %d: no leader %s", mixture, what)
			}
			if tc.propose(l, "x"); tc.settle() == 0 || len(tc.committed) == before {
				t.Fatalf("mixture %d: nothing is committed %s", mixture, what)
			}
			return l
		}
		leader := progress("at first")
		for _, apart := range tc.nodes {
			for _, other := range tc.nodes {
				tc.cut(apart.id, other.id)
				tc.cut(other.id, apart.id)
			}
			tc.run(10 * time.Second)
			tc.cuts = nil
			leader = progress("after " + apart.name + " came back")
		}
		tc.crash(leader)
		progress("after the leader's crash")
		tc.boot(leader)
		progress("after its restart")
	}
}

// lastingCut elects the first node, cuts some paths for good and lets a minute
// pass, with a proposal every second. It returns how often the leadership
// moved, and how often a second passed without a commit.
func lastingCut(tc *testCluster, cut func()) (elections, idle int) {
	tc.elect(tc.nodes[0])
	tc.run(time.Second)
	cut()
	before := len(tc.leaders)
	for range 60 {
		committed := len(tc.committed)
		if l := tc.leader(); l != nil {
			tc.propose(l, "x")
		}
		if tc.run(time.Second); len(tc.committed) == committed {
			idle++
		}
	}
	return len(tc.leaders) - before, idle
}

func withPreVote(t *testing.T, names ...string) *testCluster {
	tc := newTestCluster(t, names...)
	for _, n := range tc.nodes {
		n.limits.preVote = true
		n.core.limits.preVote = true
	}
	return tc
}

// cutBoth cuts pairs of nodes, given by number from 1 on, in both directions.
func (tc *testCluster) cutBoth(pairs ...[2]memberID) {
	for _, p := range pairs {
		tc.cut(p[0], p[1])
		tc.cut(p[1], p[0])
	}
}

// A and B do not see each other, both see C: whoever leads stays, whether it is
// at an end of the chain or in its middle.
func TestScenario_ChainOfThree(t *testing.T) {
	for _, pair := range [][2]memberID{{1, 2}, {1, 3}, {2, 3}} {
		tc := withPreVote(t, "a", "b", "c")
		elections, idle := lastingCut(tc, func() { tc.cutBoth(pair) })
		if elections != 0 || idle != 0 {
			t.Errorf("with %v cut: %d elections, %d seconds without a commit", pair, elections, idle)
		}
	}
}

// A leader that can send but not receive steps down: its heartbeats would keep
// the others from electing one that can commit.
func TestScenario_DeafLeader(t *testing.T) {
	tc := withPreVote(t, "a", "b", "c")
	elections, idle := lastingCut(tc, func() {
		tc.cut(2, 1)
		tc.cut(3, 1)
	})
	if elections != 1 || idle > 5 || tc.leader() == tc.nodes[0] {
		t.Errorf("%d elections, %d seconds without a commit", elections, idle)
	}
	wantState(t, tc.nodes[0].core, Follower, tc.nodes[0].core.currentTerm, tc.nodes[0].core.votedFor)
}

// "Raft does not guarantee liveness in the face of network faults" (Howard and
// Abraham, 2020), first topology: 1, 2 and 3 see each other, 4 sees only 2, and
// 5 only 3. In Raft as published, 4 and 5 depose every leader that they do not
// see. With pre-votes that respect a living leader the leadership stays.
func TestScenario_RaftLivenessInTheFaceOfNetworkFaults_Outsiders(t *testing.T) {
	for _, plain := range []bool{false, true} {
		tc := withPreVote(t, "1", "2", "3", "4", "5")
		for _, n := range tc.nodes {
			n.core.limits.preVote, n.core.limits.checkQuorum = !plain, !plain
		}
		elections, idle := lastingCut(tc, func() {
			tc.cutBoth([2]memberID{1, 4}, [2]memberID{1, 5}, [2]memberID{2, 5}, [2]memberID{3, 4}, [2]memberID{4, 5})
		})
		if !plain && (elections != 0 || idle != 0) {
			t.Errorf("%d elections, %d seconds without a commit", elections, idle)
		}
		if plain && elections < 5 {
			t.Errorf("%d elections without pre-votes: the topology is not the one that hurts", elections)
		}
	}
}

// The same, second topology, which pre-votes alone make worse: the leader sees
// only one server, which sees all. The others can't win without that server's
// consent, and it hears from its leader, which can't commit. So the leader must
// notice that it lost its quorum (check-quorum) and give up.
func TestScenario_RaftLivenessInTheFaceOfNetworkFaults_LeaderWithoutQuorum(t *testing.T) {
	tc := withPreVote(t, "1", "2", "3", "4", "5")
	elections, idle := lastingCut(tc, func() {
		for a := memberID(1); a <= 5; a++ {
			for b := a + 1; b <= 5; b++ {
				if a != 2 && b != 2 {
					tc.cutBoth([2]memberID{a, b})
				}
			}
		}
	})
	if elections != 1 || idle > 6 || tc.leader() != tc.nodes[1] {
		t.Errorf("%d elections, %d seconds without a commit: %s", elections, idle, tc.table(tc.nodes))
	}
}

// --- Replication ---

// permutations calls f with every order of 0 to n-1.
func permutations(n int, f func(order []int)) {
	order := make([]int, n)
	for i := range order {
		order[i] = i
	}
	var from func(int)
	from = func(k int) {
		if k == n {
			f(order)
			return
		}
		for i := k; i < n; i++ {
			order[k], order[i] = order[i], order[k]
			from(k + 1)
			order[k], order[i] = order[i], order[k]
		}
	}
	from(0)
}

// Replies in any order, each of them twice, never move match backwards, and in
// the end everything is acknowledged. (That next stays behind match is checked
// after every step.)
func TestScenario_RepliesOutOfOrder(t *testing.T) {
	permutations(4, func(order []int) {
		c := testCore(t, 1, 3)
		ack(c, 2, appendsTo(2, elect(t, c))[0])
		persist(t, c)
		var window []*appendArgs
		for _, data := range []string{"1", "2", "3", "4"} {
			window = append(window, appendsTo(2, proposeOne(t, c, data))...)
		}
		if len(window) != 4 {
			t.Fatalf("%d appends under way", len(window))
		}
		highest := Index(2)
		for range 2 {
			for _, i := range order {
				ack(c, 2, window[i])
				persist(t, c)
				highest = max(highest, window[i].lastIndex())
				if p := c.progressOf(2); p.match != highest || c.commitIndex != highest {
					t.Errorf("order %v: match %d and commit index %d after answers up to %d", order, p.match, c.commitIndex, highest)
				}
			}
		}
		if p := c.progressOf(2); p.state != streaming || len(p.inflight) != 0 || p.next != 7 {
			t.Errorf("order %v: next %d, %d under way", order, p.next, len(p.inflight))
		}
	})
}

// A reply from an earlier term of the same leader says nothing about now: the
// follower may have lost that entry to another leader since.
func TestScenario_ReplyOfEarlierLeadership(t *testing.T) {
	c := testCore(t, 1, 3)
	old := appendsTo(2, elect(t, c))[0]
	loseQuorum(t, c)
	elect(t, c)
	c.onAppendReply(2, old, &appendReply{Term: 1, Success: true})
	c.onAppendReply(2, old, &appendReply{Term: 2, Success: true})
	persist(t, c)
	if p := c.progressOf(2); p.match != 0 || c.commitIndex != 0 {
		t.Errorf("match %d, commit index %d after a reply of term 1 in term %d", p.match, c.commitIndex, c.currentTerm)
	}
}

// A late, shorter AppendEntries truncates nothing: the entries behind it may
// be acknowledged and committed.
func TestScenario_LateShorterAppend(t *testing.T) {
	tc := newTestCluster(t, "a", "b", "c")
	a, b := tc.node("a"), tc.node("b")
	tc.elect(a)
	short := tc.between(1, 2)[0]
	tc.settle()
	for range 3 {
		tc.propose(a, "x")
	}
	tc.settle()
	want := []Term{0, 1, 1, 1, 1}
	for range 2 {
		tc.deliver(short)
		if !slices.Equal(b.terms(), want) || b.core.durableIndex != 5 {
			t.Fatalf("b has %v, up to %d durable", b.terms(), b.core.durableIndex)
		}
		tc.settle()
	}
	if p := a.core.progressOf(2); p.match != 5 || a.core.commitIndex != 5 {
		t.Errorf("match %d, commit index %d", p.match, a.core.commitIndex)
	}
}

// A follower loses entries that it had acknowledged: its disk lied. The leader
// must find out with a heartbeat, probe anew and bring them back, not panic.
func TestScenario_FollowerLostItsTail(t *testing.T) {
	for _, proposes := range []bool{false, true} { // an append may come before the heartbeat
		tc := newTestCluster(t, "a", "b", "c")
		a, b := tc.node("a"), tc.node("b")
		tc.elect(a)
		tc.settle()
		for range 5 {
			tc.propose(a, "x")
		}
		tc.settle()
		if p := a.core.progressOf(2); p.match != 7 {
			t.Fatalf("match is %d", p.match)
		}
		tc.crash(b)
		tc.install(b, HardState{Term: 1, VotedFor: 1}, 1)
		if proposes {
			tc.propose(a, "y")
			tc.deliver(tc.take(tc.between(1, 2)[0]))
			tc.deliver(tc.take(tc.between(2, 1)[0]))
		}
		tc.step(a, (*core).heartbeat)
		tc.settle()
		if !slices.Equal(b.terms(), a.terms()) || a.core.role != Leader {
			t.Errorf("b has %v, the leader %v", b.terms(), a.terms())
		}
		if p := a.core.progressOf(2); p.match != a.core.log.last || p.state != streaming {
			t.Errorf("match %d of %d", p.match, a.core.log.last)
		}
		if !strings.Contains(tc.trace.String(), "b no longer has entry") {
			t.Error("the operator is not told")
		}
	}
}

// A long divergent tail converges in a few round trips: they depend on the
// number of terms in conflict, not on the number of entries.
func TestScenario_LongDivergentTail(t *testing.T) {
	repeat := func(n int, terms ...Term) (out []Term) {
		for _, term := range terms {
			out = append(out, slices.Repeat([]Term{term}, n)...)
		}
		return out
	}
	for name, v := range map[string]struct {
		leader, follower []Term
		roundTrips       int // requests to the follower until it has everything
	}{
		"one term each":            {repeat(1000, 1, 3), repeat(1000, 1, 2), 2},
		"follower longer":          {repeat(1000, 1, 3), append(repeat(1000, 1, 2), repeat(3000, 2)...), 2},
		"follower shorter":         {repeat(1000, 1, 3), repeat(500, 1, 2), 3},
		"follower without entries": {repeat(1000, 1, 3), nil, 2},
		"ten terms in turn":        {repeat(100, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19), repeat(100, 1, 2, 4, 6, 8, 10, 12, 14, 16, 18), 11},
		"ten terms of the leader":  {repeat(100, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11), repeat(100, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2), 2},
		"ten of the follower":      {repeat(100, 1, 11, 11, 11, 11, 11, 11, 11, 11, 11), repeat(100, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10), 3},
	} {
		tc := newTestCluster(t, "a", "b", "c")
		tc.trace.Reset()
		tc.install(tc.node("a"), HardState{Term: 30}, v.leader...)
		tc.install(tc.node("b"), HardState{Term: 30}, v.follower...)
		tc.elect(tc.node("a"))
		requests := 0
		for len(tc.net) > 0 {
			m := tc.take(tc.net[0])
			if m.reply == nil && m.to == 2 {
				requests++
			}
			tc.deliver(m)
		}
		if !slices.Equal(tc.node("a").terms(), tc.node("b").terms()) {
			t.Errorf("%s: the logs differ", name)
		}
		if requests > v.roundTrips {
			t.Errorf("%s: %d round trips, want at most %d", name, requests, v.roundTrips)
		}
	}
}

// A pipelined append is refused while heartbeats are answered: the window is
// given up at once and sent again, and answers to what was in it, refusals and
// late acknowledgements alike, do no harm.
func TestScenario_RefusedPipelinedAppend(t *testing.T) {
	c := testCore(t, 1, 3)
	ack(c, 2, appendsTo(2, elect(t, c))[0])
	persist(t, c)
	var window []*appendArgs
	for _, data := range []string{"1", "2", "3", "4"} {
		window = append(window, appendsTo(2, proposeOne(t, c, data))...)
	}
	if len(window) != c.limits.maxInflight {
		t.Fatalf("%d appends under way, the window is %d", len(window), c.limits.maxInflight)
	}
	if full := appendsTo(2, proposeOne(t, c, "5")); len(full) != 0 {
		t.Fatalf("sent %+v beyond the window", full)
	}
	refusal := &appendReply{Term: 1, Hint: EntryID{2, 1}}
	c.onAppendReply(2, window[1], refusal) // the first one was lost on its way
	probe := appendsTo(2, persist(t, c))
	if len(probe) != 1 || probe[0].Prev != (EntryID{2, 1}) || c.progressOf(2).state != probing {
		t.Fatalf("after the refusal sent %+v, want a probe after entry 2", probe)
	}
	for _, late := range window[2:] {
		c.onAppendReply(2, late, refusal)
		if again := appendsTo(2, persist(t, c)); len(again) != 0 {
			t.Errorf("a refusal from the window given up makes it send %+v", again)
		}
	}
	ack(c, 2, probe[0])
	sent := appendsTo(2, persist(t, c))
	for len(sent) > 0 {
		ack(c, 2, sent[0])
		sent = append(sent[1:], appendsTo(2, persist(t, c))...)
	}
	if p := c.progressOf(2); p.match != 7 || len(p.inflight) != 0 || c.commitIndex != 7 {
		t.Errorf("match %d, %d under way, commit index %d; want 7, 0, 7", p.match, len(p.inflight), c.commitIndex)
	}
}

// A window that nobody answers is given up after an election timeout, however
// alive the heartbeats are, and so is the one after it.
func TestScenario_SilentWindow(t *testing.T) {
	c := testCore(t, 1, 3)
	ack(c, 2, appendsTo(2, elect(t, c))[0])
	persist(t, c)
	for _, data := range []string{"1", "2", "3", "4"} {
		proposeOne(t, c, data)
	}
	resent := 0
	for range 35 {
		c.now = c.now.Add(c.limits.heartbeatInterval)
		c.heartbeat()
		sent := persist(t, c)
		for _, m := range sent {
			if m.append != nil && m.append.Heartbeat {
				c.onAppendReply(m.to, m.append, &appendReply{Term: 1, Success: true})
			}
		}
		if a := appendsTo(2, sent); len(a) > 0 {
			if a[0].Prev != (EntryID{2, 1}) {
				t.Fatalf("sent %+v, want the first unanswered entry again", a)
			}
			resent++
		}
		if c.role != Leader {
			t.Fatal("stepped down although everybody answers heartbeats")
		}
	}
	if resent != 3 {
		t.Errorf("sent again %d times in 3.5 election timeouts, want 3", resent)
	}
}

// A connection that breaks gives the window up too, but is not tried again
// before the next heartbeat: it may break at once for as long as the peer is down.
func TestScenario_BrokenConnection(t *testing.T) {
	tc := newTestCluster(t, "a", "b", "c")
	a := tc.node("a")
	tc.elect(a)
	tc.settle()
	for range 3 {
		tc.propose(a, "x")
	}
	tc.breakConnection(1, 2)
	if under := tc.between(1, 2); len(under) != 0 {
		t.Fatalf("%d messages right after the connection broke", len(under))
	}
	tc.step(a, (*core).heartbeat)
	tc.settle()
	if p := a.core.progressOf(2); p.match != 5 || !slices.Equal(tc.node("b").terms(), a.terms()) {
		t.Errorf("match %d, b has %v", p.match, tc.node("b").terms())
	}
}

// An acknowledgement that waited for its fsync while the term changed has lost
// its ground: the entry may have been replaced. It leaves as a refusal.
func TestScenario_AcknowledgementOutlivesTerm(t *testing.T) {
	tc := newTestCluster(t, "a", "b", "c")
	a, b := tc.node("a"), tc.node("b")
	tc.elect(a)
	b.slow = true
	tc.deliver(tc.take(tc.between(1, 2)[0])) // entry 2 waits for b's disk
	tc.timeout(tc.node("c"))
	tc.timeout(tc.node("c"))
	tc.deliver(tc.take(tc.between(3, 2)[0])) // term 2 is heard of
	if early := tc.between(2, 1); len(early) != 0 {
		t.Fatalf("%d answers before the disk had anything", len(early))
	}
	tc.flush(b)
	answers := tc.between(2, 1)
	if len(answers) != 1 {
		t.Fatalf("%d answers to the append", len(answers))
	}
	if r := answers[0].reply.appendReply; r.Success || r.Term != b.core.currentTerm || r.Term <= 1 {
		t.Errorf("in term %d acknowledges entry 2 of term 1: %+v", b.core.currentTerm, r)
	}
}

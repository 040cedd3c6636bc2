package raft

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fortytw2/leaktest"
)

// voters returns the IDs of a node's voters, in the order of their numbers.
func voters(s *Server) (ids []NodeID) {
	for _, m := range s.Status().Members {
		if !m.Learner {
			ids = append(ids, m.ID)
		}
	}
	return ids
}

// proposeN commits n commands named after what.
func proposeN(t *testing.T, h *Harness, what string, n int) {
	t.Helper()
	for k := range n {
		cmd := fmt.Sprintf("%s%d", what, k)
		leader, _ := h.CheckSingleLeader()
		if _, ok := h.SubmitToServer(leader, []byte(cmd)); !ok {
			t.Fatalf("%s was not taken", cmd)
		}
		h.CheckCommitted([]byte(cmd))
	}
}

// A fourth node is a learner until it has caught up, then votes (thesis 4.2.1).
func TestAddVoter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := NewHarness(t, 3)
		proposeN(t, h, "before", 20)
		i := h.Add()
		leader, _ := h.CheckSingleLeader()
		if got := voters(h.Server(leader)); len(got) != 4 {
			t.Fatalf("voters are %v, want 4", got)
		}
		proposeN(t, h, "after", 5)
		h.CheckLogsMatch()
		// It restarts knowing where it belongs, and its vote counts: two of four
		// are no majority, three are.
		h.CrashPeer(i)
		h.RestartPeer(i)
		h.DisconnectPeer(0)
		proposeN(t, h, "without0", 3)
	})
}

// A removed follower is told so, stops campaigning and disturbs nobody (§6).
func TestRemoveFollower(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := NewHarness(t, 4)
		leader, term := h.CheckSingleLeader()
		proposeN(t, h, "before", 3)
		gone := (leader + 1) % 4
		h.Remove(gone)
		proposeN(t, h, "after", 3)
		time.Sleep(10 * time.Second) // virtual: it has campaigned often, if it campaigns
		st := h.Server(leader).Status()
		if st.Role != Leader || st.Term != term || len(voters(h.Server(leader))) != 3 {
			t.Errorf("after 10 s the leader of term %d is %v in term %d with voters %v", term, st.Role, st.Term, voters(h.Server(leader)))
		}
		for e := range h.Server(gone).Events(expired()) {
			if e.Kind == EventRemoved {
				return
			}
		}
		t.Error("the removed node was not told")
	})
}

// expired returns a context that has ended: recent events only.
func expired() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}

// A leader that is removed commits the configuration without it, hands over at
// once, and neither leads nor campaigns any more (§6).
func TestRemoveLeader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := NewHarness(t, 3)
		leader, term := h.CheckSingleLeader()
		proposeN(t, h, "before", 3)
		h.Remove(leader)
		began := time.Now()
		next, now := h.CheckSingleLeader()
		if took := time.Since(began); next == leader || now != term+1 || took > 50*time.Millisecond {
			t.Fatalf("%v after node %d removed itself in term %d, node %d leads term %d", took, leader, term, next, now)
		}
		if got := voters(h.Server(next)); len(got) != 2 {
			t.Errorf("voters are %v, want 2", got)
		}
		proposeN(t, h, "after", 3)
		time.Sleep(time.Minute) // virtual: it has campaigned often, if it campaigns
		if still, t2 := h.CheckSingleLeader(); still != next || t2 != now {
			t.Errorf("a minute later node %d leads term %d; node %d led term %d", still, t2, next, now)
		}
		told := false
		for e := range h.Server(leader).Events(expired()) {
			told = told || e.Kind == EventRemoved
		}
		if st := h.Server(leader).Status(); !told || st.Role != Follower || st.Err != nil {
			t.Errorf("the removed leader knows it: %v; it is a %v with error %v", told, st.Role, st.Err)
		}
		h.CrashPeer(leader)
	})
}

// Five nodes are replaced one by one, and the log stays.
func TestReplaceAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := NewHarness(t, 5)
		proposeN(t, h, "before", 5)
		for i := range 5 {
			j := h.startNew()
			m := Member{ID: NodeID(fmt.Sprint(j)), Addr: harnessAddr(j)}
			h.lead("Replace", func(ctx context.Context, s *Server) error { return s.Replace(ctx, NodeID(fmt.Sprint(i)), m) })
			h.CrashPeer(i)
			proposeN(t, h, fmt.Sprintf("replaced%d-", i), 2)
		}
		leader, _ := h.CheckSingleLeader()
		if got := fmt.Sprint(voters(h.Server(leader))); got != "[5 6 7 8 9]" {
			t.Errorf("voters are %v", got)
		}
		h.CheckLogsMatch()
	})
}

// A leader that fails between the joint configuration and the next one leaves
// it to a later leader to finish the change (thesis 4.3).
func TestChangeSurvivesLeader(t *testing.T) {
	for seed := range uint64(6) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := NewHarness(t, 3, WithSeed(seed))
				proposeN(t, h, "before", 3)
				leader, _ := h.CheckSingleLeader()
				i := h.startNew()
				ctx, cancel := context.WithCancel(context.Background())
				done := make(chan error, 1)
				go func() {
					done <- h.Server(leader).AddVoter(ctx, Member{ID: NodeID(fmt.Sprint(i)), Addr: harnessAddr(i)})
				}()
				time.Sleep(time.Duration(seed) * 20 * time.Millisecond) // virtual
				synctest.Wait()                                         // it has begun
				h.CrashPeer(leader)
				cancel()
				var refused *MembershipError // it crashed first
				if err := <-done; err != nil && !errors.Is(err, ErrOutcomeUnknown) && !errors.Is(err, ErrStopped) && !errors.As(err, &refused) {
					t.Fatalf("AddVoter: %v", err)
				}
				h.RestartPeer(leader)
				proposeN(t, h, "after", 3)
				next, _ := h.CheckSingleLeader()
				// Whatever became of it, the cluster is not stuck: the next change works.
				if len(voters(h.Server(next))) == 3 && len(h.Server(next).Status().Members) == 3 {
					h.lead("Add", func(ctx context.Context, s *Server) error {
						return s.AddVoter(ctx, Member{ID: NodeID(fmt.Sprint(i)), Addr: harnessAddr(i)})
					})
				}
				time.Sleep(2 * time.Second) // virtual
				next, _ = h.CheckSingleLeader()
				if got := voters(h.Server(next)); len(got) != 4 {
					t.Errorf("voters are %v, want 4", got)
				}
			})
		})
	}
}

// Every change that can't be made is refused with its reason, and nothing changes.
func TestMembershipRefusals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := NewHarness(t, 3)
		leader, _ := h.CheckSingleLeader()
		proposeN(t, h, "x", 1)
		s, ctx := h.Server(leader), context.Background()
		follower := h.Server((leader + 1) % 3)
		check := func(what string, err error, want MembershipReason) {
			t.Helper()
			var m *MembershipError
			if !errors.As(err, &m) || m.Reason != want {
				t.Errorf("%s: got %v, want reason %d", what, err, want)
			}
		}
		check("on a follower", follower.AddVoter(ctx, Member{ID: "9", Addr: "node9:1"}), MembershipNotLeader)
		check("twice", s.AddVoter(ctx, Member{ID: "1", Addr: "node1:1"}), MembershipExists)
		check("a learner twice", s.AddLearner(ctx, Member{ID: "1", Addr: "node1:1"}), MembershipExists)
		check("an absent one", s.Remove(ctx, "9"), MembershipUnknown)
		check("nobody", s.Remove(ctx, ""), MembershipUnknown)
		check("by itself", s.Replace(ctx, "1", Member{ID: "1", Addr: "node1:1"}), MembershipExists)
		check("an absent one replaced", s.Replace(ctx, "9", Member{ID: "8", Addr: "node8:1"}), MembershipUnknown)
		for _, addr := range []string{"", "nowhere", ":1", "node9:", "node9:0", "[::1", "a:b:c"} {
			check("address "+addr, s.AddVoter(ctx, Member{ID: "9", Addr: addr}), MembershipBad)
		}
		check("no ID", s.AddLearner(ctx, Member{Addr: "node9:1"}), MembershipBad)
		check("a long ID", s.AddLearner(ctx, Member{ID: NodeID(strings.Repeat("x", 256)), Addr: "node9:1"}), MembershipBad)
		check("another's address", s.AddVoter(ctx, Member{ID: "9", Addr: "node1:1"}), MembershipSameAddr)
		check("listed twice", s.ChangeMembers(ctx, []Member{{ID: "0", Addr: "node0:1"}, {ID: "0", Addr: "node9:1"}}), MembershipBad)
		check("nobody", s.ChangeMembers(ctx, nil), MembershipNoVoters)
		check("learners only", s.ChangeMembers(ctx, []Member{{ID: "0", Addr: "node0:1", Learner: true}}), MembershipNoVoters)
		many := s.Status().Members
		for i := range maxMembers {
			many = append(many, Member{ID: NodeID(fmt.Sprint("m", i)), Addr: fmt.Sprintf("m%d:1", i), Learner: true})
		}
		check("too many", s.ChangeMembers(ctx, many), MembershipTooMany)
		if err := s.AddVoter(expired(), Member{ID: "9", Addr: "node9:1"}); !errors.Is(err, context.Canceled) || errors.Is(err, ErrOutcomeUnknown) {
			t.Errorf("with a context that has ended: %v", err)
		}
		h.DisconnectPeer((leader + 1) % 3)
		time.Sleep(200 * time.Millisecond) // virtual: an election timeout
		check("quorum at risk", s.Remove(ctx, NodeID(fmt.Sprint((leader+2)%3))), MembershipQuorum)
		if got := len(s.Status().Members); got != 3 {
			t.Errorf("%d members after refusals", got)
		}
		h.CrashPeer(leader)
		if err := s.Remove(ctx, "1"); !errors.Is(err, ErrStopped) {
			t.Errorf("on a stopped node: %v", err)
		}
		if err := s.TransferLeadership(ctx, ""); !errors.Is(err, ErrStopped) {
			t.Errorf("transfer on a stopped node: %v", err)
		}
	})
}

// Every reason has a text of its own that says what to do.
func TestMembershipReasons(t *testing.T) {
	seen := map[string]bool{}
	for r := MembershipNotLeader; int(r) < len(membershipReasons); r++ {
		text := (&MembershipError{Reason: r, Node: "n", Leader: "l"}).Error()
		if membershipReasons[r] == "" || seen[text] || !strings.Contains(text, `"n"`) {
			t.Errorf("reason %d says %q", r, text)
		}
		seen[text] = true
	}
	for r := TransferNotLeader; int(r) < len(transferReasons); r++ {
		if text := (&TransferError{Reason: r, Node: "n"}).Error(); transferReasons[r] == "" || seen[text] {
			t.Errorf("transfer reason %d says %q", r, text)
		}
	}
}

// A node that never catches up holds up its own promotion and nothing else: the
// caller is told whom it waits for, another change is made meanwhile, and
// Remove takes the promotion back.
func TestLaggingLearnerIsNotPromoted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := NewHarness(t, 3)
		proposeN(t, h, "before", 3)
		leader, _ := h.CheckSingleLeader()
		s := h.Server(leader)
		i, j := h.startNew(), h.startNew()
		h.DisconnectPeer(i)
		gone := Member{ID: NodeID(fmt.Sprint(i)), Addr: harnessAddr(i)}
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		err := s.AddVoter(ctx, gone)
		var lagging *LaggingError
		if !errors.As(err, &lagging) || lagging.Node != gone.ID || lagging.Match != 0 || lagging.Last == 0 ||
			!errors.Is(err, ErrOutcomeUnknown) || !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("adding a node that does not answer: %v", err)
		}
		if lagging.Unreached == nil || !strings.Contains(err.Error(), lagging.Unreached.Error()) {
			t.Errorf("it does not say why: %v", err)
		}
		if got := voters(s); len(got) != 3 {
			t.Errorf("voters are %v while the new one has nothing", got)
		}
		waiting := make(chan error, 1)
		go func() { // both are to become voters now, and neither does without the other
			waiting <- s.AddVoter(context.Background(), Member{ID: NodeID(fmt.Sprint(j)), Addr: harnessAddr(j)})
		}()
		synctest.Wait()
		time.Sleep(time.Second) // virtual
		if got := voters(s); len(got) != 3 {
			t.Errorf("voters are %v, before all that are to be have caught up", got)
		}
		if err := s.Remove(context.Background(), gone.ID); err != nil {
			t.Fatalf("taking the change back: %v", err)
		}
		if err := <-waiting; err != nil {
			t.Errorf("the change that came between: %v", err)
		}
		if got := voters(s); len(got) != 4 {
			t.Errorf("voters are %v, want 4", got)
		}
		h.ReconnectPeer(i)
		h.lead("Add", func(ctx context.Context, s *Server) error { return s.AddVoter(ctx, gone) })
		proposeN(t, h, "after", 3)
		h.CheckLogsMatch()
	})
}

// Whoever waits for a change that is taken back is told so.
func TestChangeTakenBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := NewHarness(t, 3)
		proposeN(t, h, "before", 1)
		leader, _ := h.CheckSingleLeader()
		s := h.Server(leader)
		waiting := make(chan error, 1)
		go func() { waiting <- s.AddVoter(context.Background(), Member{ID: "9", Addr: "node9:1"}) }()
		time.Sleep(time.Second) // virtual
		if err := s.Remove(context.Background(), "9"); err != nil {
			t.Fatal(err)
		}
		var m *MembershipError
		if err := <-waiting; !errors.As(err, &m) || m.Reason != MembershipReplaced {
			t.Errorf("the change that was taken back: %v", err)
		}
		if got := s.Status().Members; len(got) != 3 {
			t.Errorf("members are %v", got)
		}
	})
}

// Leadership goes to a named node, and no proposal made meanwhile is lost.
func TestTransfer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := NewHarness(t, 3)
		for range 6 {
			leader, term := h.CheckSingleLeader()
			to := (leader + 1) % 3
			p := h.Server(leader).Submit([]byte(fmt.Sprintf("during%d", term)))
			began := time.Now()
			h.Transfer(to)
			if took := time.Since(began); took > 150*time.Millisecond {
				t.Errorf("the transfer took %v", took)
			}
			if next, _ := h.CheckSingleLeader(); next != to {
				t.Fatalf("%d leads, want %d", next, to)
			}
			if _, err := p.Wait(context.Background()); err != nil {
				t.Errorf("a proposal made before the transfer: %v", err)
			}
		}
	})
}

func TestTransferRefusals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := NewHarness(t, 3)
		leader, term := h.CheckSingleLeader()
		s, ctx := h.Server(leader), context.Background()
		check := func(what string, err error, want TransferReason) {
			t.Helper()
			var e *TransferError
			if !errors.As(err, &e) || e.Reason != want {
				t.Errorf("%s: got %v, want reason %d", what, err, want)
			}
		}
		check("on a follower", h.Server((leader+1)%3).TransferLeadership(ctx, ""), TransferNotLeader)
		check("to nobody", s.TransferLeadership(ctx, "9"), TransferNotVoter)
		learner := NodeID(fmt.Sprint(h.startNew()))
		if err := s.AddLearner(ctx, Member{ID: learner, Addr: "node3:1"}); err != nil {
			t.Fatal(err)
		}
		check("to a learner", s.TransferLeadership(ctx, learner), TransferNotVoter)
		dead := (leader + 1) % 3
		h.CrashPeer(dead)
		time.Sleep(200 * time.Millisecond) // virtual: an election timeout
		check("to a dead node", s.TransferLeadership(ctx, NodeID(fmt.Sprint(dead))), TransferUnreachable)
		if now, t2 := h.CheckSingleLeader(); now != leader || t2 != term {
			t.Errorf("refusals changed the leader")
		}
		proposeN(t, h, "still", 2)
	})
}

// While there are two configurations, only a voter of both takes over.
func TestTransferInJointConfiguration(t *testing.T) {
	c := reconfigured(readLeader(t, 3, false), confOf(true, "vxvp"))
	for _, p := range c.progress {
		p.match = c.log.last
	}
	c.progressOf(3).match = 1 // it needs the most
	if got := c.bestSuccessor(); got != 3 {
		t.Errorf("the best successor is member %d, want 3", got)
	}
	for _, to := range []memberID{2, 4} {
		var e *TransferError
		if err := c.transferLeadership(to); !errors.As(err, &e) || e.Reason != TransferNotVoter {
			t.Errorf("a transfer to member %d: %v", to, err)
		}
	}
	c.progressOf(3).full = true
	if got := c.bestSuccessor(); got != 0 {
		t.Errorf("the best successor is member %d, want none", got)
	}
}

// A node that waits to be added hears heartbeats before it has any entry: its
// election timer must still come to rest.
func TestJoiningNodeTicksAtItsDeadline(t *testing.T) {
	c := testCore(t, 1, 3)
	c.configuration, c.configs = configuration{}, []configEntry{{}}
	c.now = c.now.Add(time.Second)
	c.onAppendRequest(&appendArgs{Term: 1, Leader: 2, Heartbeat: true}, nil)
	persist(t, c)
	c.now = c.electionDeadline
	c.tick()
	persist(t, c)
	if !c.electionDeadline.After(c.now) || c.role != Follower {
		t.Errorf("after its deadline the node is a %v whose deadline has not moved", c.role)
	}
}

// confOf makes a configuration of members a, b, c, ... with numbers 1, 2, 3, ...:
// v voter, l learner, p learner to be promoted, d voter to be demoted, x voter
// that leaves, - nobody.
func confOf(joint bool, members string) configuration {
	conf := configuration{joint: joint}
	for i, k := range members {
		m := member{id: memberID(i + 1), name: NodeID(string(rune('a' + i))), learner: k == 'l' || k == 'p'}
		m.next = map[rune]nextState{'p': becomesVoter, 'd': becomesLearner, 'x': leaves}[k]
		if k != '-' {
			conf.members = append(conf.members, m)
		}
	}
	return conf
}

// reconfigured gives a leader a configuration that is not committed: otherwise
// the one that follows a joint one would be appended.
func reconfigured(c *core, conf configuration) *core {
	c.configs[0], c.configuration = configEntry{99, conf}, conf
	c.trackMembers(c.log.last + 1)
	return c
}

func confEntry(at EntryID, conf configuration) Entries {
	return makeEntry(entryConfiguration, at, time.Time{}, conf.encode())
}

// A learner that is to become a voter does not stand for election before the
// joint configuration says so: as a leader it would wait for itself to catch
// up. (Simulator, seed 12.)
func TestLearnerDoesNotStandBeforeJoint(t *testing.T) {
	for joint, want := range map[bool]Role{false: Follower, true: Candidate} {
		c := testCore(t, 3, 3)
		c.limits.preVote = false
		c.name = "c"
		c.configuration = confOf(false, "vvl")
		c.configs = []configEntry{{1, c.configuration}}
		c.onAppendRequest(&appendArgs{Term: 1, Leader: 1, Seq: 1, Prev: EntryID{1, 0}, Entries: []Entries{confEntry(EntryID{2, 1}, confOf(joint, "vvp"))}}, nil)
		persist(t, c)
		c.now = c.electionDeadline
		c.tick()
		if persist(t, c); c.role != want {
			t.Errorf("joint %v: the learner is a %v, want %v", joint, c.role, want)
		}
	}
}

// Learners are asked for votes, so that they hear of the term, and not for
// pre-votes, which carry none; their votes count nothing. (Simulator, seed
// 1795521486681170229.)
func TestLearnersHearOfElections(t *testing.T) {
	for _, preVote := range []bool{true, false} {
		c := testCore(t, 1, 3)
		c.limits.preVote = preVote
		c.configuration = confOf(false, "vvl")
		c.now = c.electionDeadline
		c.tick()
		sent := persist(t, c)
		if preVote {
			if len(sent) != 1 || sent[0].to != 2 || !sent[0].vote.PreVote {
				t.Fatalf("asked for pre-votes: %+v; want member 2", sent)
			}
			c.onVoteReply(2, sent[0].vote, &voteReply{Granted: true})
			sent = persist(t, c)
		}
		if len(sent) != 2 || sent[0].to != 2 || sent[1].to != 3 || sent[1].vote.Term != 1 {
			t.Fatalf("asked for votes: %+v; want members 2 and 3", sent)
		}
		c.onVoteReply(3, sent[1].vote, &voteReply{Term: 1, Granted: true})
		if persist(t, c); c.role != Candidate {
			t.Fatalf("it is a %v by the vote of a learner", c.role)
		}
		c.onVoteReply(2, sent[0].vote, &voteReply{Term: 1, Granted: true})
		out := c.finish()
		votes := 0
		for _, e := range out.events {
			if e.Kind == EventElected {
				votes = e.Votes
			}
		}
		if c.role != Leader || votes != 2 {
			t.Errorf("it is a %v, elected with %d votes; want a leader with 2", c.role, votes)
		}
	}
}

// A voter that is to leave may be the only one that has the configuration
// without it. It must stand for election, because it votes for no shorter log,
// but its own vote counts nothing; once the entry is committed it stands no more
// (thesis 4.2.2). (Simulator, seed 8.)
func TestLeavingVoterStands(t *testing.T) {
	for _, after := range []string{"v-", "vl"} {
		c := testCore(t, 2, 2)
		c.name = "b"
		c.limits.preVote = false
		c.onAppendRequest(&appendArgs{Term: 1, Leader: 1, Seq: 1, Prev: EntryID{1, 0}, Commit: 2, Entries: []Entries{
			confEntry(EntryID{2, 1}, confOf(true, map[string]string{"v-": "vx", "vl": "vd"}[after])),
			confEntry(EntryID{3, 1}, confOf(false, after)),
		}}, nil)
		persist(t, c)
		elect := func() {
			c.now = c.electionDeadline
			c.tick()
		}
		elect()
		sent := persist(t, c)
		if c.role != Candidate || len(sent) != 1 || sent[0].to != 1 {
			t.Fatalf("members %s: it is a %v and asks %v; want a candidate that needs member 1", after, c.role, sent)
		}
		c.onVoteReply(1, sent[0].vote, &voteReply{Term: c.currentTerm, Granted: true})
		if persist(t, c); c.role != Leader {
			t.Fatalf("members %s: it is a %v with the vote of the only voter", after, c.role)
		}
		a := &appendArgs{Term: c.currentTerm, Seq: c.appendSeq, Prev: c.log.lastID()}
		ack(c, 1, a)
		if persist(t, c); c.role != Follower || c.commitIndex != 4 {
			t.Fatalf("members %s: it is a %v with commit %d after its entry was committed", after, c.role, c.commitIndex)
		}
		elect()
		if persist(t, c); c.role != Follower || c.campaign != nil {
			t.Errorf("members %s: it stands again when the configuration without it is committed", after)
		}
	}
}

// A node that was wiped and added again receives the configurations in which it
// voted with its former directory. That was another member. It does not vote
// for itself in its place, also not after a restart. (Simulator, seeds 10 and 99.)
func TestWipedNodeIsNotItsFormerSelf(t *testing.T) {
	old, own := [16]byte{1}, [16]byte{2}
	named := func(dir [16]byte, members string) configuration {
		conf := confOf(false, members)
		conf.members[0].dirID = dir
		return conf
	}
	first := confEntry(EntryID{1, 0}, named([16]byte{}, "l")) // it was added, its directory not known yet
	later := confEntry(EntryID{2, 1}, named(old, "v"))
	c := testCore(t, 0, 0)
	c.name, c.directory = "a", own
	c.limits.preVote = false
	stands := func() bool {
		c.now = c.now.Add(time.Minute)
		c.electionDeadline = c.now
		c.tick()
		persist(t, c)
		return c.role != Follower
	}
	hear := func(e Entries, prev EntryID) {
		c.onAppendRequest(&appendArgs{Term: 1, Leader: 9, Prev: prev, Entries: []Entries{e}}, nil)
		persist(t, c)
	}
	c.log = newRaftLog(EntryID{}, 0, nil, nil)
	c.durableIndex, c.commitIndex = 0, 0
	hear(first, EntryID{})
	hear(later, EntryID{1, 0})
	if stands() {
		t.Error("the wiped node takes the place of its former self")
	}
	rec := Recovered{Config: later.data(0), ConfigIndex: 2, older: []configAt{{1, first.data(0)}}}
	if id := rec.ownNumber("a", own); id != 0 {
		t.Errorf("after a restart the wiped node takes itself for member %d", id)
	}
	hear(confEntry(EntryID{3, 1}, named(own, "v")), EntryID{2, 1})
	if !stands() {
		t.Error("added again, the node does not stand for election")
	}
}

// A leader that is to leave and has the configuration without it, restarted, is
// still who it was. (Simulator, seed 10.)
func TestOwnNumberAfterRestart(t *testing.T) {
	data := func(conf configuration) []byte { return conf.encode() }
	joint := configAt{2, data(confOf(true, "xv"))}
	rec := Recovered{Config: data(confOf(false, "-v")), ConfigIndex: 3, older: []configAt{{1, data(confOf(false, "vv"))}, joint}}
	if id := rec.ownNumber("a", [16]byte{5}); id != 1 {
		t.Errorf("the leaving node restarts as member %d, want 1", id)
	}
	if id := (&Recovered{}).ownNumber("a", [16]byte{5}); id != 0 {
		t.Errorf("a node without a log is member %d", id)
	}
}

// A configuration goes with its entry when that is truncated, and what remains
// is what a restart finds (§6).
func TestScenario_MembershipRevertsOnTruncation(t *testing.T) {
	c := testCore(t, 2, 3)
	c.name = "b"
	c.onAppendRequest(&appendArgs{Term: 1, Leader: 1, Prev: EntryID{1, 0}, Entries: []Entries{
		confEntry(EntryID{2, 1}, confOf(false, "vvvp")), confEntry(EntryID{3, 1}, confOf(true, "vvvp"))}}, nil)
	persist(t, c)
	if got := simMemberList(&c.configuration); got != "{a b c d+(learner) joint}" || len(c.configs) != 3 {
		t.Fatalf("the newest configuration is %s of %d", got, len(c.configs))
	}
	c.onAppendRequest(appendFrom(2, EntryID{2, 1}, 0, 2), nil)
	persist(t, c)
	if got := simMemberList(&c.configuration); got != "{a b c d+(learner)}" || len(c.configs) != 2 {
		t.Errorf("entry 3 was replaced, and the configuration is %s of %d", got, len(c.configs))
	}
	c.onAppendRequest(appendFrom(3, EntryID{1, 0}, 2, 3), nil)
	persist(t, c)
	if got := simMemberList(&c.configuration); got != "{a b c}" || len(c.configs) != 1 {
		t.Errorf("entry 2 was replaced, and the configuration is %s of %d", got, len(c.configs))
	}
}

// All nodes lose their power: members, roles and directories are what they were.
func TestScenario_MembershipSurvivesRestart(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		h.settled(t, "before")
		voter := h.Add()
		learner := h.startNew()
		h.lead("AddLearner", func(ctx context.Context, s *Server) error {
			return s.AddLearner(ctx, Member{ID: NodeID(fmt.Sprint(learner)), Addr: harnessAddr(learner)})
		})
		h.Remove(0)
		h.CrashPeer(0)
		h.settled(t, "changed")
		dir := h.directory(1, NodeID(fmt.Sprint(voter)))
		for i := 1; i < len(h.nodes); i++ {
			h.CrashPeer(i)
		}
		for i := 1; i < len(h.nodes); i++ {
			h.RestartPeer(i)
		}
		h.settled(t, "after")
		for i := 1; i < len(h.nodes); i++ {
			if got := fmt.Sprint(h.Server(i).Status().Members); got != "[{1 node1:1 false} {2 node2:1 false} {3 node3:1 false} {4 node4:1 true}]" {
				t.Errorf("node %d restarts with members %s", i, got)
			}
			if got := h.directory(i, NodeID(fmt.Sprint(voter))); got != dir || dir == ([16]byte{}) {
				t.Errorf("node %d knows the added voter with directory %x, before it was %x", i, got, dir)
			}
		}
	})
}

// A node that was removed while it was cut off campaigns without asking first.
// Its term grows and grows; when it is back, it deposes nobody, raises nobody's
// term, and is told to stop.
func TestScenario_RemovedNodeWithInflatedTerm(t *testing.T) {
	virtual(t, 4, func(t *testing.T, h *Harness) {
		h.settled(t, "before")
		leader, _ := h.CheckSingleLeader()
		gone := (leader + 1) % 4
		h.DisconnectPeer(gone)
		h.Remove(gone)
		time.Sleep(time.Minute) // virtual
		leader, term := h.CheckSingleLeader()
		if st := h.Server(gone).Status(); st.Term < term+50 {
			t.Fatalf("the removed node is in term %d, the leader in term %d: it did not campaign", st.Term, term)
		}
		h.ReconnectPeer(gone)
		if !h.eventually(func() bool {
			for e := range h.Server(gone).Events(expired()) {
				if e.Kind == EventRemoved {
					return true
				}
			}
			return false
		}) {
			t.Fatal("the removed node is not told")
		}
		inflated := h.Server(gone).Status().Term
		time.Sleep(10 * time.Second) // virtual
		if st := h.Server(leader).Status(); st.Role != Leader || st.Term != term {
			t.Errorf("the leader of term %d is a %v of term %d", term, st.Role, st.Term)
		}
		if now := h.Server(gone).Status().Term; now != inflated {
			t.Errorf("the removed node went on from term %d to %d after it was told", inflated, now)
		}
		h.CrashPeer(gone)
		h.settled(t, "after")
	}, WithConfig(func(_ int, c *Config) { c.DisablePreVote = true }))
}

// A candidate believes a member that it was removed, nobody else, and only of
// itself: its directory may have been another member before.
func TestRemovedIsToldByMembers(t *testing.T) {
	for _, v := range []struct {
		from, asked memberID
		removed     bool
	}{{99, 1, false}, {2, 9, false}, {2, 1, true}} {
		c := testCore(t, 1, 3)
		asked := *votesAsked(campaignNow(t, c))[0]
		asked.Candidate = v.asked
		c.onVoteReply(v.from, &asked, &voteReply{Term: c.currentTerm, Removed: true})
		if c.removed != v.removed || (c.campaign == nil) != v.removed {
			t.Errorf("member %d says that %d was removed: it believes to be: %v, its campaign is %+v", v.from, v.asked, c.removed, c.campaign)
		}
	}
}

// A node joins with nothing but an address of its own, over TCP; later it moves
// to another port, and the others are told with ChangeMembers.
func TestMemberJoinsAndMoves(t *testing.T) {
	defer leaktest.CheckTimeout(t, 5*time.Second)()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	listen := func() net.Listener {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	start := func(id NodeID, storage Storage, bootstrap []Member, l net.Listener) *Server {
		s, err := Start(ctx, Config{ID: id, ClusterID: "moving", StateMachine: &registersMachine{}, Storage: storage, Bootstrap: bootstrap, Listener: l,
			HeartbeatInterval: 100 * time.Millisecond, ElectionTimeout: 500 * time.Millisecond, Logger: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	var founders []Member
	var listeners []net.Listener
	for i := range 3 {
		l := listen()
		listeners = append(listeners, l)
		founders = append(founders, Member{ID: NodeID(fmt.Sprint(i)), Addr: l.Addr().String()})
	}
	var servers []*Server
	for i := range 3 {
		servers = append(servers, start(NodeID(fmt.Sprint(i)), NewMemoryStorage(), founders, listeners[i]))
		defer servers[i].Close()
	}
	onLeader := func(do func(s *Server) error) { t.Helper(); askLeader(t, ctx, servers, do) }
	disk := NewMemoryStorage()
	joining := start("3", disk, nil, listen())
	onLeader(func(s *Server) error { return s.AddVoter(ctx, Member{ID: "3", Addr: joining.Status().Addr}) })
	if _, err := joining.Propose(ctx, simCommand(1, 0, true, 0)); err != nil {
		t.Fatalf("a command on the node that joined: %v", err)
	}
	if err := joining.Close(); err != nil {
		t.Fatal(err)
	}
	moved := start("3", disk, nil, listen())
	defer moved.Close()
	where := moved.Status().Addr
	onLeader(func(s *Server) error {
		list := s.Status().Members
		for i := range list {
			if list[i].ID == "3" {
				list[i].Addr = where
			}
		}
		return s.ChangeMembers(ctx, list)
	})
	r, err := servers[0].Propose(ctx, simCommand(2, 0, true, 0))
	if err != nil {
		t.Fatal(err)
	}
	if err := moved.WaitApplied(ctx, r.Index); err != nil {
		t.Errorf("the node that moved does not hear of entry %d: %v", r.Index, err)
	}
}

// askLeader has whoever leads do it, as often as leadership moves meanwhile.
func askLeader(t *testing.T, ctx context.Context, servers []*Server, do func(s *Server) error) {
	t.Helper()
	for {
		for _, s := range servers {
			err := do(s)
			var m *MembershipError
			if err == nil {
				return
			}
			if !errors.As(err, &m) || m.Reason != MembershipNotLeader && m.Reason != MembershipTooEarly && m.Reason != MembershipPending && m.Reason != MembershipQuorum {
				t.Fatal(err)
			}
		}
		pause, done := context.WithTimeout(ctx, 50*time.Millisecond)
		<-pause.Done()
		done()
	}
}

// Whoever adds a node that can't be added is told why: nobody is at its address,
// or it belongs to another cluster.
func TestAddedNodeIsNotReached(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := NewHarness(t, 1)
		defer h.Shutdown()
		leader, _ := h.CheckSingleLeader()
		s := h.Server(leader)
		add := func(addr string) *LaggingError {
			var lagging *LaggingError
			if err := s.AddVoter(within(t, time.Second), Member{ID: "new", Addr: addr}); !errors.As(err, &lagging) {
				t.Fatalf("adding a node at %s: %v", addr, err)
			}
			if err := s.Remove(t.Context(), "new"); err != nil {
				t.Fatal(err)
			}
			return lagging
		}
		if err := add("nowhere:1"); err.Unreached == nil || !strings.Contains(err.Error(), err.Unreached.Error()) {
			t.Errorf("nobody is there: %v", err)
		}
		var refused *HandshakeError
		if err := add(harnessAddr(h.startNew())); !errors.As(err.Unreached, &refused) {
			t.Errorf("a node with another ID: %v", err)
		}
	})
}

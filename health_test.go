package raft

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// beat sends a leader's heartbeats for d, answered by everybody but the disk.
func beat(t *testing.T, c *core, d time.Duration) (campaigns []memberID) {
	t.Helper()
	var box outbox
	for end := c.now.Add(d); c.now.Before(end) && c.role == Leader; {
		c.now = c.now.Add(c.limits.heartbeatInterval)
		c.heartbeat()
		out := c.finish()
		if err := c.checkState(); err != nil {
			t.Fatal(err)
		}
		box.add(out.msgs)
		for _, m := range box.release(nil, c.durableLSN, c.currentTerm, c.hardLSN) {
			switch {
			case m.append == nil || !m.append.Heartbeat:
			case m.append.Campaign:
				campaigns = append(campaigns, m.to)
			case c.role == Leader:
				c.onAppendReply(m.to, m.append, &appendReply{Term: c.currentTerm, Success: true})
			}
		}
	}
	return campaigns
}

// A leader whose disk hangs tells the best of the others to campaign, and steps
// down; it stands again when its disk does.
func TestStuckDiskGivesLeadershipUp(t *testing.T) {
	c := readLeader(t, 3, false)
	if got := beat(t, c, time.Hour); len(got) != 0 || c.role != Leader {
		t.Fatalf("an idle leader told %v to campaign and is %v", got, c.role)
	}
	var b entryBuilder
	b.add(entryCommand, []byte("x"))
	c.propose(&b) // the disk does not confirm it
	if got := beat(t, c, (diskPatience-1)*c.limits.electionTimeout); len(got) != 0 || c.role != Leader {
		t.Fatalf("it told %v to campaign after %d election timeouts, and is %v", got, diskPatience-1, c.role)
	}
	if got := beat(t, c, 2*c.limits.electionTimeout); len(got) != 1 || c.role != Follower {
		t.Fatalf("it told %v to campaign, and is %v", got, c.role)
	}
	term := c.currentTerm
	for range 5 {
		c.now = c.electionDeadline
		c.tick()
		c.finish()
	}
	if c.currentTerm != term || c.campaign != nil {
		t.Fatalf("it campaigns with a disk that hangs: term %d, was %d", c.currentTerm, term)
	}
	c.onAppendRequest(&appendArgs{Term: term, Leader: 2, Prev: EntryID{c.log.start.Index, c.log.start.Term}, Heartbeat: true, Campaign: true}, nil)
	if c.finish(); c.role != Follower {
		t.Fatalf("it takes the leadership over with a disk that hangs: %v", c.role)
	}
	c.persisted(c.lsn, time.Minute)
	c.now = c.electionDeadline
	if c.tick(); c.role != Candidate {
		t.Fatalf("with its disk back it is %v and does not campaign", c.role)
	}
}

// A follower whose state machine hangs does not campaign before that returns.
func TestStuckApplyDoesNotCampaign(t *testing.T) {
	c := readLeader(t, 3, false)
	c.stepDown(ReasonNoQuorum)
	c.applyBegins(c.now)
	began, term := c.now, c.currentTerm
	for c.now.Sub(began) < 3*applyPatience*c.limits.electionTimeout {
		c.now = c.electionDeadline
		c.campaign = nil // what was asked for before the bound
		stuck := c.now.Sub(began) >= applyPatience*c.limits.electionTimeout
		c.tick()
		c.finish()
		c.persisted(c.lsn, 0)
		if stuck && (c.campaign != nil || c.currentTerm != term) {
			t.Fatalf("after %v it campaigns", c.now.Sub(began))
		}
		term = c.currentTerm
	}
	c.applyEnds(c.commitIndex)
	c.now = c.electionDeadline
	if c.tick(); c.campaign == nil {
		t.Error("it does not campaign although its state machine is back")
	}
}

// Where nobody else could lead, a leader that is stuck goes on.
func TestStuckLeaderWithoutSuccessor(t *testing.T) {
	c := readLeader(t, 1, false)
	var b entryBuilder
	b.add(entryCommand, []byte("x"))
	c.propose(&b)
	if got := beat(t, c, time.Hour); len(got) != 0 || c.role != Leader {
		t.Fatalf("it told %v to campaign, and is %v", got, c.role)
	}
}

// A leader's disk hangs under load: others take over, writes go on, and when
// the disk is back the node catches up (hashicorp/raft 503, 666).
func TestHungDiskMovesLeadership(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := NewHarness(t, 3)
		defer h.Shutdown()
		old, _ := h.CheckSingleLeader()
		h.SlowDisk(old, time.Minute)
		h.SubmitToServer(old, []byte("hangs"))
		time.Sleep(3 * time.Second) // the bound is 1.5 s
		leader, _ := h.CheckSingleLeader()
		if leader == old {
			t.Fatal("a node whose disk hangs leads")
		}
		for k := range 3 {
			if _, err := h.Server(leader).Propose(t.Context(), []byte{byte(k)}); err != nil {
				t.Fatal(err)
			}
		}
		h.SlowDisk(old, 0) // for later writes
		time.Sleep(2 * time.Minute)
		h.CheckCommittedN([]byte("hangs"), 3)
		h.Transfer(old)
		h.CheckLogsMatch()
	})
}

// A leader whose state machine hangs hands over as well.
func TestHungApplyMovesLeadership(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		machines := make([]*blocker, 3)
		h := NewHarness(t, 3, WithStateMachineOf(func(i int) StateMachine {
			machines[i] = &blocker{entered: make(chan Index, 100), release: make(chan struct{})}
			close(machines[i].release)
			return machines[i]
		}))
		defer h.Shutdown()
		old, _ := h.CheckSingleLeader()
		h.Read(old, func(StateMachine) []byte { machines[old].release = release; return nil })
		s := h.Server(old).Submit([]byte("hangs"))
		time.Sleep(5 * time.Second) // the bound is 3 s
		if leader, _ := h.CheckSingleLeader(); leader == old {
			t.Fatal("a node whose state machine hangs leads")
		}
		close(release)
		if _, err := s.Wait(t.Context()); err != nil {
			t.Fatal(err)
		}
		h.Transfer(old)
	})
}

// answeredLoad is what clients were told that propose at nodes, one command after
// the other each.
type answeredLoad struct {
	h      *Harness
	t      *testing.T
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu      sync.Mutex
	when    []time.Time // of the answers
	results map[Index]string
	unknown int
}

func startLoad(t *testing.T, h *Harness, clients int, at func(client int) int) *answeredLoad {
	l := &answeredLoad{h: h, t: t, results: map[Index]string{}}
	var ctx context.Context
	ctx, l.cancel = context.WithCancel(context.Background())
	for c := range clients {
		l.wg.Go(func() {
			for k := 0; ctx.Err() == nil; k++ {
				cmd := fmt.Sprintf("%d/%d", c, k)
				r, err := h.Server(at(c)).Propose(ctx, []byte(cmd))
				l.told(cmd, r, err, ctx.Err() != nil)
			}
		})
	}
	return l
}

func (l *answeredLoad) told(cmd string, r Result, err error, over bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case err == nil:
		l.when = append(l.when, time.Now())
		l.results[r.Index] = cmd
	case errors.Is(err, ErrOutcomeUnknown) || errors.Is(err, ErrSuperseded):
		l.unknown++
	case !over:
		l.t.Errorf("%s: %v", cmd, err)
	}
}

// stop ends the load and returns how much was answered.
func (l *answeredLoad) stop() int {
	l.cancel()
	l.wg.Wait()
	return len(l.when)
}

// check: every answer is in the log where it was said to be.
func (l *answeredLoad) check() {
	l.h.CheckLogsMatch()
	l.h.mu.Lock()
	defer l.h.mu.Unlock()
	for index, cmd := range l.results {
		if got := string(l.h.applied[index].Data); got != cmd {
			l.t.Errorf("%s was answered with entry %d, which is %s", cmd, index, got)
		}
	}
}

// longestGap returns the longest time without an answer from began on.
func (l *answeredLoad) longestGap(began time.Time) (gap time.Duration) {
	for _, at := range l.when {
		if at.After(began) {
			gap, began = max(gap, at.Sub(began)), at
		}
	}
	return gap
}

// A follower whose disk is a hundred times slower than the others' costs them
// nothing: as much is committed in the same time as without it. (With an equal
// disk it would be the faster one of two sometimes.)
func TestSlowFollowerCostsNothing(t *testing.T) {
	t.Parallel()
	committed := func(change func(h *Harness, follower int)) (n int) {
		synctest.Test(t, func(t *testing.T) {
			h := NewHarness(t, 3)
			defer h.Shutdown()
			h.Delay(300*time.Microsecond, 5*time.Millisecond) // otherwise the disks may fall into step, or out of it, for good
			leader, term := h.CheckSingleLeader()
			for i := range 3 {
				h.SlowDisk(i, 5*time.Millisecond)
			}
			follower := (leader + 1) % 3
			change(h, follower)
			l := startLoad(t, h, 8, func(int) int { return leader })
			time.Sleep(4 * time.Second)
			n = l.stop()
			if _, now := h.CheckSingleLeader(); now != term {
				t.Errorf("the leadership moved: term %d, was %d", now, term)
			}
			for i := range 3 {
				h.SlowDisk(i, 0)
			}
			if !h.nodes[follower].running {
				h.RestartPeer(follower)
			}
			l.check()
		})
		return n
	}
	equal := committed(func(*Harness, int) {})
	without := committed(func(h *Harness, follower int) { h.CrashPeer(follower) })
	slow := committed(func(h *Harness, follower int) { h.SlowDisk(follower, 500*time.Millisecond) })
	t.Logf("commands in 4 s: %d with equal disks, %d without a follower, %d with one whose disk is a hundred times slower", equal, without, slow)
	// The network's dice alone make some hundredths; waiting for that disk would
	// leave a fiftieth.
	if slow < without*80/100 || slow < equal*75/100 || equal < 800 {
		t.Errorf("a slow follower lowers the rate to %d; it is %d without it, and %d with equal disks", slow, without, equal)
	}
}

// The leader's disk hangs under load, with other dice each time: nothing is lost,
// the leadership moves within the bound, and the time without an answer is short.
func TestHungDiskUnderLoad(t *testing.T) {
	t.Parallel()
	var gaps, moves []time.Duration
	for seed := range uint64(seedCount(20)) {
		synctest.Test(t, func(t *testing.T) {
			h := NewHarness(t, 3, WithSeed(seed+1))
			defer h.Shutdown()
			h.Delay(time.Millisecond, 20*time.Millisecond)
			for i := range 3 {
				h.SlowDisk(i, 2*time.Millisecond)
			}
			leader, _ := h.CheckSingleLeader()
			l := startLoad(t, h, 4, func(c int) int { return (leader + 1 + c%2) % 3 })
			time.Sleep(time.Duration(300+17*seed) * time.Millisecond)
			hung := time.Now()
			h.SlowDisk(leader, time.Hour)
			for h.Server(leader).Status().Role == Leader {
				time.Sleep(time.Millisecond)
			}
			moves = append(moves, time.Since(hung))
			time.Sleep(time.Second)
			l.stop()
			gaps = append(gaps, l.longestGap(hung))
			if now, _ := h.CheckSingleLeader(); now == leader {
				t.Errorf("seed %d: a node whose disk hangs leads", seed)
			}
			h.CrashPeer(leader)
			h.SlowDisk(leader, 0)
			h.RestartPeer(leader)
			l.check()
		})
	}
	slices.Sort(gaps)
	slices.Sort(moves)
	t.Logf("the leader's disk hangs, %d runs, election timeout 150 ms: it gives leadership up after %v to %v; longest time without an answer: median %v, at most %v",
		len(moves), moves[0], moves[len(moves)-1], gaps[len(gaps)/2], gaps[len(gaps)-1])
	if bound := (diskPatience + 2) * 150 * time.Millisecond; moves[len(moves)-1] > bound || gaps[len(gaps)-1] > bound {
		t.Errorf("leadership moved after %v at most, answers were missing for %v at most, the bound is %v", moves[len(moves)-1], gaps[len(gaps)-1], bound)
	}
}

// A server that should not lead campaigns all the same once it has refused its
// vote to one that lacks what it has, until it hears of a leader.
func TestUnfitServerIsNeeded(t *testing.T) {
	lacking := func(preVote bool) *voteArgs { return &voteArgs{Term: 5, Candidate: 2, PreVote: preVote} }
	refuse := func(c *core) { c.onVoteRequest(lacking(true), nil) }
	for _, test := range []struct {
		name  string
		unfit func(c *core)
		then  func(c *core)
		want  bool
	}{
		{"nobody asked", func(c *core) { c.diskSpace(ErrDiskFull) }, func(c *core) {}, false},
		{"full", func(c *core) { c.diskSpace(ErrDiskFull) }, refuse, true},
		{"a vote refused", func(c *core) { c.diskSpace(ErrDiskFull) }, func(c *core) { c.onVoteRequest(lacking(false), nil) }, true},
		{"an older term refused", func(c *core) { c.diskSpace(ErrDiskFull) }, func(c *core) { c.onVoteRequest(&voteArgs{Candidate: 2, PreVote: true}, nil) }, true},
		{"apply failed", func(c *core) { c.stopApplying(2, errors.New("test")) }, refuse, true},
		{"apply hangs", func(c *core) { c.applyBegins(c.now.Add(-time.Hour)) }, refuse, true},
		{"the disk hangs", func(c *core) { c.unsyncedSince = c.now.Add(-time.Hour) }, refuse, false},
		{"shutting down", func(c *core) { c.retire() }, refuse, false},
		{"another one leads", func(c *core) { c.diskSpace(ErrDiskFull) }, func(c *core) {
			refuse(c)
			c.onAppendRequest(&appendArgs{Term: 9, Leader: 3, Prev: c.log.lastID(), Heartbeat: true}, nil)
		}, false},
		{"another one gets the vote", func(c *core) { c.diskSpace(ErrDiskFull) }, func(c *core) {
			refuse(c)
			c.onVoteRequest(&voteArgs{Term: 9, Candidate: 3, Last: c.log.lastID()}, nil)
		}, false},
		{"the leader is protected", func(c *core) { c.diskSpace(ErrDiskFull) }, func(c *core) {
			c.onAppendRequest(&appendArgs{Term: 9, Leader: 3, Prev: c.log.lastID(), Heartbeat: true}, nil)
			refuse(c)
		}, false},
	} {
		c := readLeader(t, 3, false)
		c.stepDown(ReasonNoQuorum)
		test.unfit(c)
		test.then(c)
		c.now = c.electionDeadline
		c.tick()
		c.finish()
		if got := c.campaign != nil; got != test.want {
			t.Errorf("%s: it campaigns: %v, want %v", test.name, got, test.want)
		}
	}
}

// A voter that did not take over when it was asked to comes after the others.
func TestDeclinedTransferGoesToAnother(t *testing.T) {
	c := readLeader(t, 3, false)
	c.diskSpace(ErrDiskFull)
	var asked []memberID
	for len(asked) < 3 && c.role == Leader {
		asked = append(asked, beat(t, c, c.limits.electionTimeout)...)
	}
	if len(asked) != 3 || asked[0] == asked[1] || asked[2] != asked[0] {
		t.Errorf("a leader with a full disk asks %v to take over, want both in turn", asked)
	}
}

// While the disk of a cluster's only voter hangs, and not even its term is
// durable, what it has to tell a learner does not pile up.
func TestNothingPilesUpBeforeTheTermIsDurable(t *testing.T) {
	c := testCore(t, 1, 2)
	c.configuration.members[1].learner = true
	c.configs[0].conf = c.configuration
	c.now = c.electionDeadline
	c.tick()
	var box outbox
	box.add(c.finish().msgs)
	if c.role != Leader || c.durableLSN >= c.hardLSN {
		t.Fatalf("the only voter is %v; its term is durable: %v", c.role, c.durableLSN >= c.hardLSN)
	}
	before := len(box.waiting)
	for range 1000 {
		c.now = c.now.Add(c.limits.heartbeatInterval)
		c.heartbeat()
		c.reconnect(2)
		box.add(c.finish().msgs)
	}
	if after := len(box.waiting); after > before {
		t.Errorf("after 1000 heartbeats %d messages wait for the disk, before them %d", after, before)
	}
	c.persisted(c.lsn, 0)
	c.heartbeat()
	if len(c.finish().msgs) == 0 {
		t.Error("with its term durable it sends no heartbeat")
	}
}

// Of three servers one is dead. The second has what the third lacks, and a full
// disk. It leads until the third has everything, which then leads.
func TestUnfitServerLeadsForAnother(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		dead, _ := h.CheckSingleLeader()
		full, behind := (dead+1)%3, (dead+2)%3
		h.DisconnectPeer(behind)
		submit(t, h, dead, 1)
		committedOn(h, 2, 1)
		h.FillDisk(full)
		w := newWriter()
		for !diskFull(h, full) {
			_ = w.write(h, dead)
		}
		h.CrashPeer(dead)
		var waiting sync.WaitGroup
		for _, i := range []int{full, behind} {
			waiting.Go(func() {
				if _, err := h.Server(i).Propose(t.Context(), []byte("waits")); err != nil {
					t.Errorf("a proposal that waits at server %d for who takes over: %v", i, err)
				}
			})
		}
		h.ReconnectPeer(behind)
		must(t, h, "the server that was behind leads", func() bool { return h.Server(behind).Status().Role == Leader })
		waiting.Wait()
		committedOn(h, 2, 1)
		if got := h.Server(full).Status(); got.Role == Leader || !got.DiskFull {
			t.Errorf("the full server is %v, full: %v", got.Role, got.DiskFull)
		}
		h.FreeDisk(full)
		must(t, h, "a write", func() bool { return w.write(h, behind) == nil })
		h.RestartPeer(dead)
		h.CheckCommittedN(bulky(w.next-1), 3)
		w.check(t, h)
	})
}

// A leader that was elected with a full disk hands leadership over as soon as its
// first entry is committed, not at its next heartbeat. Proposals wait until then
// and are not refused, unless nobody else has space either.
func TestNeededLeaderYieldsAtOnce(t *testing.T) {
	for _, othersFull := range []bool{false, true} {
		c := testCore(t, 1, 3)
		c.diskSpace(ErrDiskFull)
		c.heldUp = true
		sent := elect(t, c)
		if c.outOfSpace() || c.hasRoom() || c.takesFrom(2) {
			t.Error("proposals do not wait for who takes over")
		}
		for _, to := range []memberID{2, 3} {
			a := &appendArgs{Term: c.currentTerm, Heartbeat: true}
			if !othersFull {
				a = appendsTo(to, sent)[0]
			}
			c.onAppendReply(to, a, &appendReply{Term: c.currentTerm, Success: true, Full: othersFull})
		}
		if c.finish(); c.outOfSpace() != othersFull || (c.transfer.to == 0) != othersFull {
			t.Errorf("others are full: %v; it hands over to %d, refuses proposals: %v", othersFull, c.transfer.to, c.outOfSpace())
		}
	}
}

// The state machine of a leader fails at an entry that only it and a dead server
// have. It leads until the third one has everything, which then leads.
func TestApplyFailsAheadOfOthers(t *testing.T) {
	var armed atomic.Bool
	virtual(t, 3, func(t *testing.T, h *Harness) {
		leader, _ := h.CheckSingleLeader()
		dead, behind := (leader+1)%3, (leader+2)%3
		h.CrashPeer(behind)
		armed.Store(true)
		_, err := h.Server(leader).Propose(t.Context(), []byte("poison"))
		unknown(t, "the proposal that panicked", err, ErrOutcomeUnknown)
		armed.Store(false)
		h.CrashPeer(dead)
		h.RestartPeer(behind)
		must(t, h, "the server that was behind leads", func() bool { return h.Server(behind).Status().Role == Leader })
		submit(t, h, behind, 2)
		h.CheckCommittedN([]byte("poison"), 1)
		h.CrashPeer(leader)
		h.RestartPeer(leader)
		h.RestartPeer(dead)
		h.CheckCommittedN([]byte("poison"), 3)
	}, WithStateMachine(func() StateMachine { return &fragileMachine{armed: &armed} }))
}

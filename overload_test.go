package raft

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// Room in the queue goes to those that wait for it, in turn; who does not wait
// gets none meanwhile, however small what it brings.
func TestQueueTurns(t *testing.T) {
	q := proposalQueue{maxBytes: 1000}
	newQueued(&q, strings.Repeat("a", 500))
	newQueued(&q, strings.Repeat("b", 300))
	first := newWaiting(&q, strings.Repeat("c", 800), true)
	second := newWaiting(&q, "d", true)
	gone := newWaiting(&q, "e", true)
	if isClosed(first.done) || isClosed(second.done) {
		t.Fatalf("whoever waits is told %v and %v", first.err, second.err)
	}
	if late := newQueued(&q, "f"); !errors.Is(late.err, ErrOverloaded) {
		t.Fatalf("a proposal gets room for which others wait: %v", late.err)
	}
	if !q.withdraw(gone) || q.withdraw(gone) {
		t.Error("a proposal that waits is taken back once")
	}
	got := commandsOf(q.take(540))
	if len(got) != 1 || got[0][0] != 'a' || q.withdraw(second) == false {
		t.Fatalf("took %.5q", got)
	}
	third := newWaiting(&q, "g", true) // there is room for it, and not for the one before
	if got := commandsOf(q.take(1 << 20)); len(got) != 1 || got[0][0] != 'b' {
		t.Fatalf("took %.5q", got)
	}
	if got := commandsOf(q.take(1 << 20)); len(got) != 2 || got[0][0] != 'c' || got[1] != "g" {
		t.Fatalf("took %.5q", got)
	}
	if isClosed(first.done) || isClosed(third.done) || q.withdraw(first) {
		t.Error("what was taken was rejected, or waits")
	}
	newQueued(&q, strings.Repeat("h", 990))
	waiting := newWaiting(&q, "i", true)
	if rejected := q.close(ErrStopped); len(rejected) != 2 || rejected[1] != waiting {
		t.Errorf("close rejects %d proposals, want the one queued and the one that waits", len(rejected))
	}
}

// flood submits commands at a node as fast as it can, for as long as the test
// lets it, and returns how many were taken.
func flood(h *Harness, i int, stop <-chan struct{}, wg *sync.WaitGroup) *int {
	taken := new(int)
	tick := time.NewTicker(500 * time.Microsecond)
	wg.Go(func() {
		defer tick.Stop()
		for !isClosed(stop) {
			for range 20 {
				if p := h.Server(i).Submit(make([]byte, 2000)); !isClosed(p.done) {
					*taken++
				}
			}
			<-tick.C
		}
	})
	return taken
}

// smallLimits are those of a cluster that a flood fills at once.
var smallLimits = configured(func(c *Config) {
	c.MaxQueueBytes, c.MaxUncommittedBytes, c.MaxFrameBytes, c.MaxCommandBytes = 64<<10, 64<<10, 16<<10, 4<<10
})

// A flood at one node keeps nobody else out: neither those who wait at the same
// node nor those at other nodes.
func TestFloodStarvesNobody(t *testing.T) {
	t.Parallel()
	for _, at := range []string{"leader", "follower", "both"} {
		t.Run(at, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := NewHarness(t, 3, smallLimits)
				defer h.Shutdown()
				h.Delay(time.Millisecond, 5*time.Millisecond)
				for i := range 3 {
					h.SlowDisk(i, 2*time.Millisecond)
				}
				leader, term := h.CheckSingleLeader()
				stop := make(chan struct{})
				var wg sync.WaitGroup
				var taken []*int
				if at != "follower" {
					taken = append(taken, flood(h, leader, stop, &wg))
				}
				if at != "leader" {
					taken = append(taken, flood(h, (leader+1)%3, stop, &wg))
				}
				time.Sleep(100 * time.Millisecond)
				served := make([]int, 3)
				longest := make([]time.Duration, 3)
				for i := range 3 {
					wg.Go(func() {
						for !isClosed(stop) {
							began := time.Now()
							ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
							_, err := h.Server(i).Propose(ctx, []byte("polite"))
							cancel()
							if err != nil {
								t.Errorf("a client at node %d (leader: %d): %v", i, leader, err)
								return
							}
							served[i]++
							longest[i] = max(longest[i], time.Since(began))
						}
					})
				}
				time.Sleep(time.Second)
				close(stop)
				wg.Wait()
				t.Logf("flood at the %s: %d and more commands taken; clients that wait: served %v, longest wait %v", at, *taken[0], served, longest)
				for i := range 3 {
					if served[i] < 10 || longest[i] > 250*time.Millisecond {
						t.Errorf("a client at node %d (leader: %d) was served %d times in 1 s, once after %v", i, leader, served[i], longest[i])
					}
				}
				if _, now := h.CheckSingleLeader(); now != term {
					t.Errorf("the flood cost the leader its leadership: term %d, was %d", now, term)
				}
			})
		})
	}
}

// A leader that has no room takes one batch at a time from each follower.
func TestFloodedLeaderTakesFromEach(t *testing.T) {
	c := readLeader(t, 3, false)
	c.limits.maxUncommittedSize = 1000
	batch := func() *entryBuilder {
		var b entryBuilder
		b.add(entryCommand, nil, make([]byte, 1000))
		return &b
	}
	c.propose(batch())
	if c.hasRoom() {
		t.Fatal("there is room for more")
	}
	for _, id := range []memberID{2, 3} {
		if !c.takesFrom(id) {
			t.Fatalf("follower %d is kept out", id)
		}
		c.proposeFor(id, batch())
		if c.takesFrom(id) {
			t.Fatalf("follower %d may forward as much as it likes", id)
		}
	}
	c.finish()
	c.persisted(c.lsn, 0)
	p := c.progressOf(2)
	c.onAppendReply(2, &appendArgs{Term: c.currentTerm, Prev: EntryID{c.log.last, c.currentTerm}, Seq: c.appendSeq}, &appendReply{Term: c.currentTerm, Success: true})
	if c.commitIndex != c.log.last || !c.takesFrom(2) || !c.takesFrom(3) || c.takesFrom(9) && !c.hasRoom() {
		t.Errorf("once everything is settled: commit %d of %d, match %d, takes %v", c.commitIndex, c.log.last, p.match, c.takesFrom(2))
	}
}

// Who waits for room in the queue until its context ends is told that there was
// none, and its command never commits.
func TestProposeWaitsForRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := NewHarness(t, 3, smallLimits)
		defer h.Shutdown()
		leader, _ := h.CheckSingleLeader()
		for i := range 3 {
			h.DisconnectPeer(i)
		}
		time.Sleep(time.Second) // nobody leads
		for k := 0; k < 10_000 && h.Server(leader).Submit(make([]byte, 100)).err == nil; k++ {
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := h.Server(leader).Propose(ctx, append([]byte("late"), make([]byte, 96)...))
		if !errors.Is(err, ErrOverloaded) || !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, ErrOutcomeUnknown) {
			t.Errorf("a proposal that found no room: %v", err)
		}
		waited := make(chan error)
		go func() {
			_, err := h.Server(leader).Propose(t.Context(), make([]byte, 100))
			waited <- err
		}()
		synctest.Wait()
		h.Heal()
		if err := <-waited; err != nil {
			t.Errorf("a proposal that found room: %v", err)
		}
		h.CheckNotCommitted(append([]byte("late"), make([]byte, 96)...))
	})
}

// What a node has staged and not synced is bounded, on a leader whose disk is
// slower than those of the others, and on a follower.
func TestUnsyncedIsBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		h := NewHarness(t, 3, configured(func(c *Config) {
			c.MaxQueueBytes, c.MaxUncommittedBytes, c.MaxFrameBytes, c.MaxInflightBytes = 512<<10, 512<<10, 16<<10, 64<<10
			c.MaxCommandBytes, c.MaxLogMemoryBytes = 4<<10, 1
		}))
		defer h.Shutdown()
		leader, _ := h.CheckSingleLeader()
		stop := make(chan struct{})
		var wg sync.WaitGroup
		h.SlowDisk(leader, 500*time.Millisecond)
		taken := flood(h, leader, stop, &wg)
		unsynced := func(i int) (n int) {
			h.Server(i).cm.step(func(c *core) {
				for _, e := range c.log.tail {
					if e.Last() > c.durableIndex {
						n += e.size()
					}
				}
			})
			return n
		}
		most := 0
		for range 1200 {
			time.Sleep(time.Millisecond)
			most = max(most, unsynced(leader))
		}
		if limit := (512 + 16 + 4) << 10; most > limit || most < 256<<10 {
			t.Errorf("the leader had %d bytes unsynced, want at most %d", most, limit)
		}
		t.Logf("leader: at most %d bytes unsynced, %d commands taken", most, *taken)
		h.SlowDisk(leader, 0)
		follower := (leader + 1) % 3
		h.SlowDisk(follower, 500*time.Millisecond)
		most = 0
		for range 1200 {
			time.Sleep(time.Millisecond)
			most = max(most, unsynced(follower))
		}
		if limit := (64 + 16 + 16 + 4) << 10; most > limit || most < 16<<10 {
			t.Errorf("a follower had %d bytes unsynced, want at most %d", most, limit)
		}
		t.Logf("follower: at most %d bytes unsynced", most)
		close(stop)
		wg.Wait()
	})
}

package raft

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fortytw2/leaktest"
)

// The founding experiment: elections and replication on a real cluster, and
// nothing left of it afterwards. leaktest is asked twice. Inside the bubble it
// judges what Shutdown itself has joined, in virtual time. Outside it sees what
// would have escaped from the bubble, in real time.

// virtual runs f on a cluster in virtual time.
func virtual(t *testing.T, n int, f func(t *testing.T, h *Harness), opts ...HarnessOption) {
	t.Helper()
	defer leaktest.CheckContext(lookFor(100*time.Millisecond), t)()
	synctest.Test(t, func(t *testing.T) {
		defer leaktest.CheckContext(lookFor(100*time.Millisecond), t)()
		h := NewHarness(t, n, opts...)
		defer h.Shutdown()
		f(t, h)
	})
}

// overTCP runs f on a cluster in real time.
func overTCP(t *testing.T, n int, f func(t *testing.T, h *Harness), opts ...HarnessOption) {
	t.Helper()
	defer leaktest.CheckContext(lookFor(100*time.Millisecond), t)()
	h := NewHarness(t, n, append(opts, WithTCP())...)
	defer h.Shutdown()
	f(t, h)
}

func configured(f func(c *Config)) HarnessOption {
	return WithConfig(func(_ int, c *Config) { f(c) })
}

var (
	withoutPreVote = configured(func(c *Config) { c.DisablePreVote = true })
	// fragile is the timing under which the ancestor left a goroutine behind:
	// heartbeats far rarer than election deadlines.
	fragile = configured(func(c *Config) { c.HeartbeatInterval = 3 * time.Second })
	// unhurried is for real time on a machine that does other things too.
	unhurried = configured(func(c *Config) { c.ElectionTimeout = 500 * time.Millisecond })
)

// must waits until ok returns true, as the harness's checks do.
func must(t *testing.T, h *Harness, what string, ok func() bool) {
	t.Helper()
	if !h.eventually(ok) {
		t.Fatalf("not within %v: %s%s", h.patience, what, h.describe())
	}
}

// holds checks ok at every millisecond for d, in virtual time.
func holds(t *testing.T, h *Harness, d time.Duration, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if !ok() {
			t.Fatalf("no longer so: %s%s", what, h.describe())
		}
	}
}

func other(h *Harness, i, k int) int { return (i + k) % h.n }

// The followers of a leader whose process dies see its connections close. They
// do not wait for their deadlines; those of a leader that falls silent do.
func TestElectionWithoutWaiting(t *testing.T) {
	for _, silent := range []bool{false, true} {
		virtual(t, 5, func(t *testing.T, h *Harness) {
			apart, back, limit := h.CrashPeer, h.RestartPeer, h.Server(0).conf.ElectionTimeout/2
			if silent {
				apart, back = h.DisconnectPeer, h.ReconnectPeer
			}
			for range 10 {
				leader, before := h.CheckSingleLeader()
				must(t, h, "all follow", func() bool {
					for i := range h.n {
						if h.Server(i).Status().Leader != NodeID(fmt.Sprint(leader)) {
							return false
						}
					}
					return true
				})
				began := time.Now()
				apart(leader)
				must(t, h, "another leader", func() bool {
					_, term, ok := h.leader(h.connectedNodes())
					return ok && term > before
				})
				if took := time.Since(began); took < limit != !silent {
					t.Errorf("silent: %v; a new leader after %v, half the election timeout is %v", silent, took, limit)
				}
				back(leader)
			}
		})
	}
}

func TestElectionBasic(t *testing.T) {
	basic := func(t *testing.T, h *Harness) {
		leader, term := h.CheckSingleLeader()
		if term == 0 {
			t.Error("a leader of term 0")
		}
		for i := range h.n {
			must(t, h, "all follow the leader", func() bool {
				st := h.Server(i).Status()
				return st.Term == term && st.Leader == h.Server(leader).conf.ID && (st.Role == Leader) == (i == leader)
			})
		}
	}
	t.Run("virtual", func(t *testing.T) { virtual(t, 3, basic) })
	t.Run("tcp", func(t *testing.T) { overTCP(t, 3, basic, unhurried) })
}

func TestElectionStable(t *testing.T) {
	virtual(t, 5, func(t *testing.T, h *Harness) {
		leader, term := h.CheckSingleLeader()
		holds(t, h, 5*time.Second, "the leader stays", func() bool {
			st := h.Server(leader).Status()
			return st.Role == Leader && st.Term == term
		})
	})
}

func TestElectionLeaderDisconnect(t *testing.T) {
	disconnect := func(t *testing.T, h *Harness) {
		first, term := h.CheckSingleLeader()
		h.DisconnectPeer(first)
		second, newTerm := h.CheckSingleLeader()
		if second == first || newTerm <= term {
			t.Errorf("leader %d of term %d after leader %d of term %d was cut off", second, newTerm, first, term)
		}
		must(t, h, "the old leader hears no quorum and steps down", func() bool {
			return h.Server(first).Status().Role != Leader
		})
	}
	t.Run("virtual", func(t *testing.T) { virtual(t, 3, disconnect) })
	t.Run("tcp", func(t *testing.T) { overTCP(t, 3, disconnect, unhurried) })
}

func TestElectionLeaderAndAnotherDisconnect(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		leader, term := h.CheckSingleLeader()
		another, left := other(h, leader, 1), other(h, leader, 2)
		h.DisconnectPeer(leader)
		h.DisconnectPeer(another)
		holds(t, h, 3*time.Second, "one of three can't lead", func() bool {
			return h.Server(left).Status().Role != Leader && h.Server(another).Status().Role != Leader
		})
		h.CheckNoLeader()
		h.ReconnectPeer(another)
		if _, newTerm := h.CheckSingleLeader(); newTerm <= term {
			t.Errorf("term %d after term %d", newTerm, term)
		}
	})
}

func TestElectionDisconnectAllThenRestore(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		h.CheckSingleLeader()
		for i := range h.n {
			h.DisconnectPeer(i)
		}
		time.Sleep(450 * time.Millisecond)
		holds(t, h, 2*time.Second, "nobody leads", func() bool {
			for i := range h.n {
				if h.Server(i).Status().Role == Leader {
					return false
				}
			}
			return true
		})
		h.CheckNoLeader()
		for i := range h.n {
			h.ReconnectPeer(i)
		}
		h.CheckSingleLeader()
	})
}

func TestElectionLeaderComesBack(t *testing.T) {
	for _, n := range []int{3, 5} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			virtual(t, n, func(t *testing.T, h *Harness) {
				first, _ := h.CheckSingleLeader()
				h.DisconnectPeer(first)
				second, term := h.CheckSingleLeader()
				time.Sleep(350 * time.Millisecond)
				h.ReconnectPeer(first)
				holds(t, h, 2*time.Second, "leader and term stay", func() bool {
					st := h.Server(second).Status()
					return st.Role == Leader && st.Term == term
				})
				if leader, again := h.CheckSingleLeader(); leader != second || again != term {
					t.Errorf("leader %d of term %d, want %d of %d", leader, again, second, term)
				}
				if st := h.Server(first).Status(); st.Term != term || st.Role != Follower {
					t.Errorf("the old leader is %v in term %d, want a Follower in %d", st.Role, st.Term, term)
				}
			})
		})
	}
}

func TestElectionFollowerComesBack(t *testing.T) {
	t.Run("pre-vote", func(t *testing.T) {
		virtual(t, 3, func(t *testing.T, h *Harness) {
			leader, term := h.CheckSingleLeader()
			away := other(h, leader, 1)
			h.DisconnectPeer(away)
			time.Sleep(650 * time.Millisecond)
			h.ReconnectPeer(away)
			holds(t, h, 2*time.Second, "leader and term stay", func() bool {
				st := h.Server(leader).Status()
				return st.Role == Leader && st.Term == term
			})
			if st := h.Server(away).Status(); st.Term != term || st.Role != Follower {
				t.Errorf("who was away is %v in term %d, want a Follower in %d", st.Role, st.Term, term)
			}
		})
	})
	t.Run("without pre-vote", func(t *testing.T) {
		virtual(t, 3, func(t *testing.T, h *Harness) {
			leader, term := h.CheckSingleLeader()
			away := other(h, leader, 1)
			h.DisconnectPeer(away)
			time.Sleep(650 * time.Millisecond)
			raised := h.Server(away).Status().Term
			if raised <= term {
				t.Errorf("a node that campaigns alone is in term %d, want more than %d", raised, term)
			}
			h.ReconnectPeer(away)
			must(t, h, "the others adopt its term", func() bool {
				_, newTerm := h.CheckSingleLeader()
				return newTerm > term && newTerm >= raised
			})
		}, withoutPreVote)
	})
}

func TestElectionDisconnectLoop(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		var before Term
		for range 10 {
			leader, term := h.CheckSingleLeader()
			if term <= before {
				t.Errorf("term %d after a round without quorum in term %d", term, before)
			}
			before = term
			another := other(h, leader, 1)
			h.DisconnectPeer(leader)
			h.DisconnectPeer(another)
			holds(t, h, 310*time.Millisecond, "no connected node leads", func() bool {
				return h.Server(other(h, leader, 2)).Status().Role != Leader
			})
			h.CheckNoLeader()
			h.ReconnectPeer(another)
			h.ReconnectPeer(leader)
			must(t, h, "a leader of a later term", func() bool {
				_, term := h.CheckSingleLeader()
				return term > before
			})
		}
	})
}

// TestElectionFollowerComesBackFragile is the story that started the project:
// with heartbeats every 3 seconds and election deadlines of 150 to 300 ms every
// leader is deposed before its first heartbeat, and each must take its
// heartbeat goroutine along, while the ticker still has seconds to go.
func TestElectionFollowerComesBackFragile(t *testing.T) {
	churn := func(t *testing.T, h *Harness) {
		leader, term := h.CheckSingleLeader()
		away := other(h, leader, 1)
		h.DisconnectPeer(away)
		for range 5 {
			before := term
			must(t, h, "leaders churn", func() bool {
				_, term = h.CheckSingleLeader()
				return term > before
			})
		}
		h.ReconnectPeer(away)
		for range 5 {
			before := term
			must(t, h, "leaders churn on", func() bool {
				_, term = h.CheckSingleLeader()
				return term > before
			})
		}
	}
	t.Run("virtual", func(t *testing.T) { virtual(t, 3, churn, fragile) })
	t.Run("tcp", func(t *testing.T) { overTCP(t, 3, churn, fragile) })
}

// cmd returns the i-th of a test's commands.
func cmd(i int) []byte { return fmt.Appendf(nil, "command %d", i) }

// submit has the current leader append commands.
func submit(t *testing.T, h *Harness, to int, cmds ...int) {
	t.Helper()
	for _, i := range cmds {
		if _, ok := h.SubmitToServer(to, cmd(i)); !ok {
			t.Fatalf("node %d does not lead:%s", to, h.describe())
		}
	}
}

func committedOn(h *Harness, n int, cmds ...int) {
	h.t.Helper()
	for _, i := range cmds {
		h.CheckCommittedN(cmd(i), n)
	}
}

func TestCommitOneCommand(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		leader, _ := h.CheckSingleLeader()
		index, _ := h.SubmitToServer(leader, cmd(42))
		count, at := h.CheckCommitted(cmd(42))
		if count != 3 || at != index {
			t.Errorf("%d nodes have it at index %d, want 3 at %d", count, at, index)
		}
	})
}

func TestSubmitToFollower(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		leader, _ := h.CheckSingleLeader()
		if _, ok := h.SubmitToServer(other(h, leader, 1), cmd(1)); ok {
			t.Error("a follower appended a command")
		}
		time.Sleep(time.Second)
		h.CheckNotCommitted(cmd(1))
	})
}

func TestCommitManyCommands(t *testing.T) {
	many := func(t *testing.T, h *Harness) {
		h.CheckSingleLeader()
		var wg sync.WaitGroup
		for i := range 200 {
			wg.Go(func() {
				r, err := h.Server(i%h.n).Propose(t.Context(), cmd(i))
				if err != nil || string(r.Data) != string(cmd(i)) {
					t.Errorf("command %d: %q, %v", i, r.Data, err)
				}
			})
		}
		wg.Wait()
		for i := range 200 {
			h.CheckCommittedN(cmd(i), 3)
		}
		h.CheckLogsMatch()
	}
	t.Run("virtual", func(t *testing.T) { virtual(t, 3, many) })
	t.Run("tcp", func(t *testing.T) { overTCP(t, 3, many, unhurried, WithDisk(t.TempDir())) })
}

func TestCommitInOrder(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		leader, _ := h.CheckSingleLeader()
		var last Index
		for i := range 30 {
			submit(t, h, leader, i)
		}
		for i := range 30 {
			if _, at := h.CheckCommitted(cmd(i)); at <= last {
				t.Errorf("command %d at index %d, the one before at %d", i, at, last)
			} else {
				last = at
			}
		}
	})
}

func TestCommitWithFollowerAway(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		leader, term := h.CheckSingleLeader()
		submit(t, h, leader, 1)
		committedOn(h, 3, 1)
		away := other(h, leader, 1)
		h.DisconnectPeer(away)
		submit(t, h, leader, 2, 3)
		committedOn(h, 2, 2, 3)
		time.Sleep(time.Second)
		if _, known := h.nodes[away].machine.find(cmd(2)); known {
			t.Error("a disconnected node has the command")
		}
		h.ReconnectPeer(away)
		committedOn(h, 3, 2, 3)
		if l, again := h.CheckSingleLeader(); l != leader || again != term {
			t.Errorf("leader %d of term %d, want %d of %d", l, again, leader, term)
		}
		h.CheckLogsMatch()
	})
}

func TestCommitNoQuorum(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		leader, term := h.CheckSingleLeader()
		submit(t, h, leader, 5, 6)
		committedOn(h, 3, 5, 6)
		a, b := other(h, leader, 1), other(h, leader, 2)
		h.DisconnectPeer(a)
		h.DisconnectPeer(b)
		submit(t, h, leader, 8)
		time.Sleep(2 * time.Second)
		h.CheckNotCommitted(cmd(8))
		h.ReconnectPeer(a)
		h.ReconnectPeer(b)
		var newTerm Term
		must(t, h, "a leader of a later term", func() bool {
			leader, newTerm = h.CheckSingleLeader()
			return newTerm > term
		})
		submit(t, h, leader, 9, 10)
		committedOn(h, 3, 9, 10)
		h.CheckLogsMatch()
	})
}

func TestLeaderCutOffWithUncommittedEntries(t *testing.T) {
	virtual(t, 5, func(t *testing.T, h *Harness) {
		first, _ := h.CheckSingleLeader()
		submit(t, h, first, 5, 6)
		committedOn(h, 5, 6)
		h.DisconnectPeer(first)
		submit(t, h, first, 21, 22, 23, 24)
		second, _ := h.CheckSingleLeader()
		submit(t, h, second, 8, 9, 10)
		committedOn(h, 4, 8, 9, 10)
		h.CheckNotCommitted(cmd(21))

		// The next leader knows nothing of how far the others are.
		h.CrashPeer(second)
		h.CheckSingleLeader()
		h.RestartPeer(second)
		h.ReconnectPeer(first)
		third, _ := h.CheckSingleLeader()
		submit(t, h, third, 11)
		committedOn(h, 5, 5, 6, 8, 9, 10, 11)
		for i := 21; i <= 24; i++ {
			h.CheckNotCommitted(cmd(i))
		}
		h.CheckLogsMatch()
	})
}

func TestLeaderDisconnectedBriefly(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		leader, term := h.CheckSingleLeader()
		submit(t, h, leader, 1)
		committedOn(h, 3, 1)
		h.DisconnectPeer(leader)
		submit(t, h, leader, 2)
		time.Sleep(50 * time.Millisecond)
		h.ReconnectPeer(leader)
		committedOn(h, 3, 2)
		if l, again := h.CheckSingleLeader(); l != leader || again != term {
			t.Errorf("leader %d of term %d, want %d of %d", l, again, leader, term)
		}
	})
}

func TestCommitWithCallsDropped(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		leader, _ := h.CheckSingleLeader()
		submit(t, h, leader, 1)
		committedOn(h, 3, 1)
		h.PeerDropCallsAfterN(leader, 0)
		submit(t, h, leader, 99)
		time.Sleep(30 * time.Millisecond)
		h.CheckNotCommitted(cmd(99))
		h.PeerDontDropCalls(leader)
		committedOn(h, 3, 99)

		// Dropped for good, they cost the leader its office, and only that.
		leader, term := h.CheckSingleLeader()
		h.PeerDropCallsAfterN(leader, 1)
		must(t, h, "another leader", func() bool {
			l, newTerm := h.CheckSingleLeader()
			return l != leader && newTerm > term
		})
		h.PeerDontDropCalls(leader)
		leader, _ = h.CheckSingleLeader()
		submit(t, h, leader, 100)
		committedOn(h, 3, 100)
		h.CheckLogsMatch()
	})
}

func TestCommitOnLossyNetwork(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		h.CheckSingleLeader()
		h.Delay(time.Millisecond, 40*time.Millisecond)
		h.Drop(0.05)
		var wg sync.WaitGroup
		for i := range 30 {
			wg.Go(func() {
				// Outcomes may be unknown; what is applied is checked by the harness.
				ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
				defer cancel()
				h.Server(i%h.n).Propose(ctx, cmd(i))
			})
			time.Sleep(100 * time.Millisecond)
		}
		wg.Wait()
		h.Heal()
		leader, _ := h.CheckSingleLeader()
		submit(t, h, leader, 1000)
		committedOn(h, 3, 1000)
		h.CheckLogsMatch()
	})
}

// storages are the ways to keep a node's state: what MemoryStorage was told to
// flush, and a disk in memory whose power can be cut.
func onStorages(t *testing.T, n int, f func(t *testing.T, h *Harness)) {
	t.Run("memory", func(t *testing.T) {
		storages := make([]*MemoryStorage, n)
		for i := range storages {
			storages[i] = NewMemoryStorage()
		}
		virtual(t, n, f, WithConfig(func(i int, c *Config) { c.Storage = storages[i] }))
	})
	t.Run("disk", func(t *testing.T) { virtual(t, n, f) })
}

func TestCrashFollower(t *testing.T) {
	onStorages(t, 3, func(t *testing.T, h *Harness) {
		leader, _ := h.CheckSingleLeader()
		follower := other(h, leader, 1)
		submit(t, h, leader, 5, 6, 7)
		committedOn(h, 3, 5, 6, 7)
		h.CrashPeer(follower)
		submit(t, h, leader, 8)
		committedOn(h, 2, 5, 6, 7, 8)
		h.RestartPeer(follower)
		committedOn(h, 3, 5, 6, 7, 8)
		h.CheckLogsMatch()
	})
}

func TestCrashLeader(t *testing.T) {
	onStorages(t, 3, func(t *testing.T, h *Harness) {
		leader, term := h.CheckSingleLeader()
		submit(t, h, leader, 5, 6, 7)
		committedOn(h, 3, 5, 6, 7)
		h.CrashPeer(leader)
		second, newTerm := h.CheckSingleLeader()
		if second == leader || newTerm <= term {
			t.Errorf("leader %d of term %d after the crash of %d of term %d", second, newTerm, leader, term)
		}
		submit(t, h, second, 8)
		committedOn(h, 2, 5, 6, 7, 8)
		h.RestartPeer(leader)
		committedOn(h, 3, 5, 6, 7, 8)
		h.CheckLogsMatch()
	})
}

func TestCrashAll(t *testing.T) {
	onStorages(t, 3, func(t *testing.T, h *Harness) {
		leader, term := h.CheckSingleLeader()
		submit(t, h, leader, 5, 6, 7)
		committedOn(h, 3, 5, 6, 7)
		for i := range h.n {
			h.CrashPeer(i)
		}
		time.Sleep(350 * time.Millisecond)
		for i := range h.n {
			h.RestartPeer(i)
			if st := h.Server(i).Status(); st.Term < term {
				t.Errorf("node %d restarted in term %d, it was in %d", i, st.Term, term)
			}
		}
		leader, newTerm := h.CheckSingleLeader()
		if newTerm <= term {
			t.Errorf("term %d after term %d", newTerm, term)
		}
		submit(t, h, leader, 8)
		committedOn(h, 3, 5, 6, 7, 8)
		h.CheckLogsMatch()
	})
}

// A leader that crashes right after it appended leaves an entry that may or may
// not survive; whichever, all agree.
func TestCrashAfterSubmit(t *testing.T) {
	onStorages(t, 3, func(t *testing.T, h *Harness) {
		leader, _ := h.CheckSingleLeader()
		submit(t, h, leader, 5)
		h.CrashPeer(leader)
		h.CheckSingleLeader()
		h.RestartPeer(leader)
		second, _ := h.CheckSingleLeader()
		submit(t, h, second, 6)
		committedOn(h, 3, 6)
		h.CheckLogsMatch()
	})
}

// TestCrashUnderLoad cuts the power of the whole cluster while clients write:
// whatever was acknowledged is there afterwards.
func TestCrashUnderLoad(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		for i := range h.n {
			h.SlowDisk(i, time.Duration(i+1)*time.Millisecond)
		}
		var mu sync.Mutex
		var acknowledged []int
		next := 0
		for round := range 5 {
			h.CheckSingleLeader()
			var wg sync.WaitGroup
			for range 8 {
				wg.Go(func() {
					for {
						mu.Lock()
						i := next
						next++
						mu.Unlock()
						ctx, cancel := context.WithTimeout(t.Context(), time.Second)
						_, err := h.Server(i%h.n).Propose(ctx, cmd(i))
						cancel()
						if err != nil {
							if !errors.Is(err, ErrOutcomeUnknown) && !errors.Is(err, ErrStopped) {
								t.Errorf("command %d: %v", i, err)
							}
							return
						}
						mu.Lock()
						acknowledged = append(acknowledged, i)
						mu.Unlock()
					}
				})
			}
			time.Sleep(time.Duration(50+7*round) * time.Millisecond)
			for i := range h.n {
				h.CrashPeer(other(h, i, round))
			}
			wg.Wait()
			for i := range h.n {
				h.RestartPeer(i)
			}
		}
		h.CheckSingleLeader()
		if len(acknowledged) < 50 {
			t.Errorf("only %d commands were acknowledged; the test has no force", len(acknowledged))
		}
		slices.Sort(acknowledged)
		committedOn(h, 3, acknowledged...)
		h.CheckLogsMatch()
	})
}

// TestRestartOverTCP restarts every node once on real directories and sockets.
func TestRestartOverTCP(t *testing.T) {
	dir := t.TempDir()
	overTCP(t, 3, func(t *testing.T, h *Harness) {
		leader, _ := h.CheckSingleLeader()
		submit(t, h, leader, 1, 2, 3)
		committedOn(h, 3, 1, 2, 3)
		for i := range h.n {
			h.CrashPeer(i)
			h.CheckSingleLeader()
			h.RestartPeer(i)
			committedOn(h, 3, 1, 2, 3)
		}
		for i := range h.n {
			h.CrashPeer(i)
		}
		for i := range h.n {
			h.RestartPeer(i)
		}
		leader, _ = h.CheckSingleLeader()
		submit(t, h, leader, 4)
		committedOn(h, 3, 1, 2, 3, 4)
		h.CheckLogsMatch()
	}, unhurried, WithDisk(dir))
}

package raft

import (
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// A cluster that loses leaders, nodes and messages and sends snapshots is
// linearizable, reads included. All of it in virtual time.
func TestHistoryUnderFaults(t *testing.T) {
	t.Parallel()
	snapshots(t, 3, func(t *testing.T, h *Harness) {
		h.CheckSingleLeader()
		h.Drop(0.02)
		h.Delay(time.Millisecond, 5*time.Millisecond)
		var wg sync.WaitGroup
		stop := make(chan struct{})
		for client := range 4 {
			s, m := h.Server(client%2), h.node(client%2).machine // node 2 is restarted meanwhile
			wg.Go(func() {
				for k := 0; !isClosed(stop); k++ {
					s.Submit(fmt.Appendf(nil, "%d.%d", client, k)).Wait(t.Context())
					if _, err := s.ReadIndex(t.Context()); err == nil {
						m.read(func(m StateMachine) []byte { return []byte(strings.Join(m.(*journal).lines, " ")) })
					}
					time.Sleep(30 * time.Millisecond) // what a read returns, and checking it, grows with each command
				}
			})
		}
		for k := range 6 {
			time.Sleep(2 * time.Second)
			switch k % 3 {
			case 0:
				h.Partition([]int{k % 2})
			case 1:
				h.Heal()
				h.CheckSingleLeader()
				h.TakeSnapshot(2)
			case 2:
				h.CrashPeer(2)
				time.Sleep(time.Second)
				h.RestartPeer(2)
			}
		}
		h.Heal()
		close(stop)
		h.Drop(0)
		h.CheckSingleLeader()
		wg.Wait()
		h.CheckLinearizable()
		answered := 0
		for _, op := range h.history.ops {
			if op.p.err == nil {
				answered++
			}
		}
		if answered < 100 || len(h.history.reads) < 100 {
			t.Errorf("only %d commands and %d reads were answered", answered, len(h.history.reads))
		}
	})
}

// whimsical is a state machine whose results depend on more than the log.
type whimsical struct {
	noSnapshots
	what string
	seen map[string]bool
}

func (w *whimsical) Apply(e Entry) []byte {
	switch w.what {
	case "time":
		return fmt.Append(nil, time.Now().UnixNano())
	case "chance":
		return fmt.Append(nil, rand.Uint64())
	}
	w.seen[string(e.Data)] = true
	var order []string
	for s := range w.seen {
		order = append(order, s)
	}
	return []byte(strings.Join(order, ","))
}

func (w *whimsical) Restore(io.Reader) error { return errNoSnapshots }

// A state machine that uses map order, the clock or chance is found out, also
// where all nodes happen to agree, and so is one on a single node.
func TestHistoryFindsWhims(t *testing.T) {
	for _, what := range []string{"map order", "time", "chance"} {
		var failures []string
		synctest.Test(t, func(t *testing.T) {
			judge := &harnessJudge{T: t}
			h := NewHarness(judge, 1, WithStateMachine(func() StateMachine { return &whimsical{what: what, seen: map[string]bool{}} }))
			h.CheckSingleLeader()
			for k := range 20 {
				if _, err := h.Server(0).Propose(t.Context(), fmt.Append(nil, k)); err != nil {
					t.Fatal(err)
				}
			}
			time.Sleep(time.Second)
			h.CheckLinearizable()
			h.Shutdown()
			failures = judge.failures
		})
		if !slices.ContainsFunc(failures, func(f string) bool { return strings.Contains(f, "depends on something else than the log") }) {
			t.Errorf("%s: failures are %q", what, failures)
		}
	}
}

// harnessJudge keeps failures instead of reporting them.
type harnessJudge struct {
	*testing.T
	failures []string
}

func (j *harnessJudge) Errorf(format string, args ...any) {
	j.failures = append(j.failures, fmt.Sprintf(format, args...))
}

// A machine on disk is replayed too, on a fresh one for node -1.
func TestHistoryOfMachinesOnDisk(t *testing.T) {
	fresh := &table{}
	tables := []*table{{}, {}, {}}
	snapshots(t, 3, func(t *testing.T, h *Harness) {
		proposeN(t, h, "a", 10)
		h.CrashPeer(1)
		h.RestartPeer(1)
		proposeN(t, h, "b", 3)
		h.CheckLinearizable()
		if got := len(fresh.newest().lines); got != 13 {
			t.Errorf("%d commands were applied again, want 13", got)
		}
	}, WithStateMachineOf(func(i int) StateMachine {
		if i < 0 {
			return tableMachine{fresh}
		}
		return tableMachine{tables[i]}
	}))
}

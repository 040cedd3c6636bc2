package raft

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// silentLeader calls f on a follower, offset after its leader fell silent. It
// returns for how long f went on after the follower knew of another leader, or
// after it began.
func silentLeader(t *testing.T, offset time.Duration, f func(t *testing.T, s *Server)) (after time.Duration) {
	synctest.Test(t, func(t *testing.T) {
		h := NewHarness(t, 3)
		defer h.Shutdown()
		old, _ := h.CheckSingleLeader()
		s := h.Server(other(h, old, 1))
		if _, err := s.Propose(within(t, time.Second), cmd(0)); err != nil { // the links are up
			t.Fatal(err)
		}
		if _, err := s.ReadIndex(within(t, time.Second)); err != nil {
			t.Fatal(err)
		}
		known := make(chan time.Time, 1)
		silent := time.Now()
		h.Pause(old)
		go func() {
			defer close(known)
			for e := range s.Events(t.Context()) {
				leads := e.Kind == EventLeader || e.Kind == EventRole && e.Role == Leader
				if leads && e.Time.After(silent) {
					known <- e.Time
					return
				}
			}
		}()
		time.Sleep(offset)
		began := time.Now()
		f(t, s)
		ended := time.Now()
		since := <-known
		if since.Before(began) {
			since = began
		}
		after = ended.Sub(since)
		h.Resume(old)
		appliedOnce(t, h)
	})
	return after
}

// Whoever has asked a leader that falls silent learns soon that another one
// leads: half an election timeout after asking, however long a connection may be
// silent otherwise. What may be sent again is answered by the new one.
func TestSilentLeaderIsNotWaitedFor(t *testing.T) {
	const half, beat = 75 * time.Millisecond, 50 * time.Millisecond
	for _, c := range []struct {
		name  string
		bound time.Duration
		call  func(ctx context.Context, s *Server) error
	}{
		{"Propose", half, func(ctx context.Context, s *Server) error {
			_, err := s.Propose(ctx, cmd(1))
			if errors.Is(err, ErrOutcomeUnknown) {
				return nil
			}
			return err
		}},
		{"OpenSession", half + beat + 25*time.Millisecond, func(ctx context.Context, s *Server) error {
			_, err := s.OpenSession(ctx)
			return err
		}},
		{"ReadIndex", half + beat + 25*time.Millisecond, func(ctx context.Context, s *Server) error {
			_, err := s.ReadIndex(ctx)
			return err
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var longest time.Duration
			for offset := time.Duration(0); offset < 300*time.Millisecond; offset += 20 * time.Millisecond {
				longest = max(longest, silentLeader(t, offset, func(t *testing.T, s *Server) {
					if err := c.call(within(t, 10*time.Second), s); err != nil {
						t.Error(err)
					}
				}))
			}
			t.Logf("at most %v after another leader was known", longest)
			if longest > c.bound {
				t.Errorf("a wait went on for %v after another leader was known, want %v at most", longest, c.bound)
			}
		})
	}
}

// Handing leadership over costs no proposal its answer, at whichever node it was
// made, also where messages and disks are slow.
func TestTransferLosesNoAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := NewHarness(t, 3, unhurried) // a transfer is given up after an election timeout
		defer h.Shutdown()
		h.CheckSingleLeader()
		h.Delay(10*time.Millisecond, 20*time.Millisecond)
		for i := range 3 {
			h.SlowDisk(i, 20*time.Millisecond)
		}
		var wg sync.WaitGroup
		stop := make(chan struct{})
		finish := sync.OnceFunc(func() { close(stop); wg.Wait() })
		defer finish()
		answered := make([]int, 3)
		for i := range 3 {
			wg.Go(func() {
				for k := 0; !isClosed(stop); k++ {
					if _, err := h.Server(i).Propose(within(t, 10*time.Second), cmd(1000*i+k)); err != nil {
						t.Errorf("proposal %d at node %d: %v", k, i, err)
					}
					answered[i]++
				}
			})
		}
		for range 20 {
			leader, _ := h.CheckSingleLeader()
			h.Transfer(other(h, leader, 1))
			time.Sleep(300 * time.Millisecond)
		}
		finish()
		t.Logf("answers: %v", answered)
		h.CheckLinearizable()
	})
}

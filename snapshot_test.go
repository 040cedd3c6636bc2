package raft

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// journal is a state machine that remembers every command, and whose snapshots
// a test can hold up, break and count.
type journal struct {
	lines     []string
	filler    int           // bytes that a snapshot has beside the lines
	hold      chan struct{} // WriteTo waits until it is closed, if it is not nil
	fault     *atomic.Pointer[string]
	snapshots atomic.Int32
	closes    atomic.Int32
	restores  atomic.Int32
}

func (j *journal) Apply(e Entry) []byte {
	j.lines = append(j.lines, string(e.Data))
	return fmt.Append(nil, len(j.lines))
}

func (j *journal) faulty(where string) error {
	if j.fault == nil || j.fault.Load() == nil || !strings.HasPrefix(*j.fault.Load(), where) {
		return nil
	}
	if strings.HasSuffix(*j.fault.Load(), "panic") {
		panic("the journal is on fire")
	}
	return errors.New("the journal is full")
}

type journalCapture struct {
	j    *journal
	text string
}

func (j *journal) Snapshot() (Capture, error) {
	j.snapshots.Add(1)
	if err := j.faulty("Snapshot"); err != nil {
		return nil, err
	}
	return &journalCapture{j, strings.Join(j.lines, "\n") + "\x00" + strings.Repeat("x", j.filler)}, nil
}

func (c *journalCapture) WriteTo(ctx context.Context, w io.Writer) error {
	if c.j.hold != nil {
		select {
		case <-c.j.hold:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if err := c.j.faulty("WriteTo"); err != nil {
		return err
	}
	_, err := io.WriteString(w, c.text)
	return err
}

func (c *journalCapture) Close() { c.j.closes.Add(1) }

func (j *journal) Restore(r io.Reader) error {
	j.restores.Add(1)
	if err := j.faulty("Restore"); err != nil {
		return err
	}
	b, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	text, _, ok := strings.Cut(string(b), "\x00")
	if !ok {
		return errors.New("a journal without its end")
	}
	j.lines = strings.Split(text, "\n")
	return nil
}

func journalOf(h *Harness, i int) *journal { return h.StateMachine(i).(*journal) }

func readJournal(h *Harness, i int) string {
	return string(h.Read(i, func(m StateMachine) []byte { return []byte(strings.Join(m.(*journal).lines, " ")) }))
}

// snapshots runs f with a cluster of journals in virtual time. Its logs keep
// nothing behind a snapshot.
func snapshots(t *testing.T, n int, f func(t *testing.T, h *Harness), opts ...HarnessOption) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		opts = append([]HarnessOption{
			WithStateMachine(func() StateMachine { return &journal{} }),
			WithConfig(func(_ int, c *Config) { c.KeepLogBytes = 1 }),
		}, opts...)
		h := NewHarness(t, n, opts...)
		defer h.Shutdown()
		f(t, h)
	})
}

// caughtUp waits until node i has applied what the leader has.
func caughtUp(t *testing.T, h *Harness, i int) {
	t.Helper()
	leader, _ := h.CheckSingleLeader()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	want, err := h.Server(leader).ReadIndex(ctx) // it may lead without having applied all that is committed
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Server(i).WaitApplied(ctx, want); err != nil {
		t.Fatalf("node %d did not apply entry %d: %v; its status is %+v", i, want, err, h.Server(i).Status())
	}
	if got, want := readJournal(h, i), readJournal(h, leader); got != want {
		t.Fatalf("node %d has %q, the leader %q", i, got, want)
	}
}

// A node that has taken a snapshot drops the log before it, and starts again
// from it: nothing that the snapshot includes is applied a second time.
func TestSnapshotRestart(t *testing.T) {
	snapshots(t, 1, func(t *testing.T, h *Harness) {
		proposeN(t, h, "a", 20)
		before := h.Server(0).Status()
		h.TakeSnapshot(0)
		after := h.Server(0).Status()
		if after.First < before.Last || after.Last != before.Last || after.Snapshot != before.Applied {
			t.Fatalf("log was %d to %d, is %d to %d with a snapshot up to %d", before.First, before.Last, after.First, after.Last, after.Snapshot)
		}
		proposeN(t, h, "b", 3)
		want := readJournal(h, 0)
		h.CrashPeer(0)
		h.RestartPeer(0)
		h.CheckSingleLeader()
		caughtUp(t, h, 0)
		if got := readJournal(h, 0); got != want {
			t.Fatalf("after the restart it has %q, want %q", got, want)
		}
		if n := journalOf(h, 0).restores.Load(); n != 1 {
			t.Fatalf("Restore was called %d times", n)
		}
		h.TakeSnapshot(0)
		h.CrashPeer(0)
		h.RestartPeer(0) // from a log that may be empty
		proposeN(t, h, "c", 3)
	})
}

// leaveBehind disconnects a follower, has the leader commit commands and
// compact them, and waits, in virtual time, until no append that was made
// before is on its way.
func leaveBehind(t *testing.T, h *Harness) (leader, behind int) {
	t.Helper()
	leader, _ = h.CheckSingleLeader()
	behind = (leader + 1) % 3
	h.DisconnectPeer(behind)
	proposeN(t, h, "a", 32) // more appends than a window has: those in it arrive later
	h.TakeSnapshot(leader)
	time.Sleep(5 * time.Second)
	return leader, behind
}

// A follower that lacks entries which were compacted is sent a snapshot, and
// goes on from it with appends: §7.
func TestSnapshotToFollower(t *testing.T) {
	snapshots(t, 3, func(t *testing.T, h *Harness) {
		_, behind := leaveBehind(t, h)
		proposeN(t, h, "c", 5)
		h.ReconnectPeer(behind)
		caughtUp(t, h, behind)
		if n := journalOf(h, behind).restores.Load(); n != 1 {
			t.Fatalf("Restore was called %d times", n)
		}
		proposeN(t, h, "d", 5)
		caughtUp(t, h, behind)
		want := readJournal(h, behind)
		h.CrashPeer(behind)
		h.RestartPeer(behind)
		caughtUp(t, h, behind)
		if got := readJournal(h, behind); got != want {
			t.Fatalf("after the restart it has %q, want %q", got, want)
		}
		h.CheckLogsMatch()
	})
}

// A new node gets the configuration with the snapshot.
func TestSnapshotToNewNode(t *testing.T) {
	snapshots(t, 3, func(t *testing.T, h *Harness) {
		proposeN(t, h, "a", 30)
		for i := range 3 {
			h.TakeSnapshot(i)
		}
		i := h.Add()
		caughtUp(t, h, i)
		h.CrashPeer(i)
		h.RestartPeer(i)
		caughtUp(t, h, i)
		h.Transfer(i)
		proposeN(t, h, "b", 3)
	})
}

// A founder that was cut short before it had entry 1 finds, when it comes back,
// a cluster that has compacted it. It waits for the leader and gets a snapshot.
func TestSnapshotToFounder(t *testing.T) {
	snapshots(t, 3, func(t *testing.T, h *Harness) {
		h.CheckSingleLeader()
		h.CrashPeer(2)
		disk := h.node(2).disk.mem
		names, err := disk.List("data/wal")
		if err != nil || len(names) == 0 {
			t.Fatal(names, err)
		}
		for _, name := range names { // as its first start leaves it; its directory ID stays
			if err := disk.Remove("data/wal/" + name); err != nil {
				t.Fatal(err)
			}
		}
		if err := disk.Rename("data/identity", "data/identity.new"); err != nil {
			t.Fatal(err)
		}
		proposeN(t, h, "a", 10)
		for i := range 2 {
			h.TakeSnapshot(i)
		}
		synctest.Wait()    // the log is cut
		for i := range 2 { // what they know of the forming is forgotten
			h.CrashPeer(i)
		}
		for i := range 2 {
			h.RestartPeer(i)
		}
		proposeN(t, h, "b", 3)
		h.RestartPeer(2)
		caughtUp(t, h, 2)
		if n := journalOf(h, 2).restores.Load(); n != 1 {
			t.Fatalf("Restore was called %d times", n)
		}
		h.CrashPeer(0)
		proposeN(t, h, "c", 3) // its vote and its disk count
	})
}

// The policy counts bytes and entries since the last snapshot.
func TestSnapshotPolicy(t *testing.T) {
	for name, set := range map[string]func(c *Config){
		"entries": func(c *Config) { c.SnapshotEveryEntries, c.SnapshotEveryBytes = 10, -1 },
		"bytes":   func(c *Config) { c.SnapshotEveryEntries, c.SnapshotEveryBytes = -1, 500 },
		"never":   func(c *Config) { c.SnapshotEveryEntries, c.SnapshotEveryBytes = -1, -1 },
	} {
		t.Run(name, func(t *testing.T) {
			snapshots(t, 1, func(t *testing.T, h *Harness) {
				proposeN(t, h, "a", 60)
				synctest.Wait()
				st := h.Server(0).Status()
				n := journalOf(h, 0).snapshots.Load()
				if name == "never" && (n != 0 || st.Snapshot != 0) || name != "never" && (n < 3 || n > 8 || st.Snapshot+15 < st.Applied) {
					t.Fatalf("took %d snapshots, the last up to %d of %d", n, st.Snapshot, st.Applied)
				}
			}, WithConfig(func(_ int, c *Config) { c.KeepLogBytes = 1; set(c) }))
		})
	}
}

// What is kept behind a snapshot serves followers that are a little behind.
func TestSnapshotKeepsLog(t *testing.T) {
	snapshots(t, 3, func(t *testing.T, h *Harness) {
		leader, _ := h.CheckSingleLeader()
		behind := (leader + 1) % 3
		h.DisconnectPeer(behind)
		proposeN(t, h, strings.Repeat("a", 100), 20)
		h.TakeSnapshot(leader)
		if st := h.Server(leader).Status(); st.Snapshot != st.Applied || st.First != 1 {
			t.Fatalf("log begins at %d, snapshot ends at %d, applied %d", st.First, st.Snapshot, st.Applied)
		}
		h.ReconnectPeer(behind)
		caughtUp(t, h, behind)
		if n := journalOf(h, behind).restores.Load(); n != 0 {
			t.Fatalf("it was sent %d snapshots", n)
		}
	}, WithConfig(func(_ int, c *Config) { c.KeepLogBytes = 1 << 20 }))
}

// However much is written, what a node has on disk stays bounded: segments,
// snapshots, and what is kept behind them.
func TestSnapshotsBoundDisk(t *testing.T) {
	snapshots(t, 1, func(t *testing.T, h *Harness) {
		h.CheckSingleLeader()
		s, disk := h.Server(0), h.node(0).disk.mem
		most := int64(0)
		payload := bytes.Repeat([]byte("x"), 1000)
		for range 100 {
			var ps []*Proposal
			for range 200 {
				ps = append(ps, s.Submit(payload))
			}
			for _, p := range ps {
				if _, err := p.Wait(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			synctest.Wait() // a snapshot that is due is taken, and what it frees is free
			most = max(most, disk.Used())
		}
		// 20 MB were written. There are two segments of 1 MiB in use and one made
		// ready, one being dropped, and small snapshots.
		if limit := int64(6 << 20); most > limit {
			t.Errorf("the disk held up to %d bytes, want at most %d", most, limit)
		}
	}, WithStateMachine(func() StateMachine { return &tally{} }),
		WithConfig(func(_ int, c *Config) {
			c.KeepLogBytes, c.SnapshotEveryBytes, c.MaxSegmentBytes = 100<<10, 500<<10, 1<<20
		}))
}

// tally is a state machine with a small state.
type tally struct{ n int }

func (c *tally) Apply(Entry) []byte         { c.n++; return nil }
func (c *tally) Snapshot() (Capture, error) { return CaptureBytes(fmt.Append(nil, c.n)), nil }
func (c *tally) Restore(r io.Reader) error  { _, err := fmt.Fscan(r, &c.n); return err }

// While a captured state is written, entries are applied and heartbeats flow.
// One asked for meanwhile is taken afterwards: it is not lost.
func TestSnapshotBesideApply(t *testing.T) {
	var hold chan struct{}
	snapshots(t, 3, func(t *testing.T, h *Harness) {
		leader, term := h.CheckSingleLeader()
		s := h.Server(leader)
		proposeN(t, h, "a", 5)
		first, second := make(chan error, 1), make(chan error, 1)
		go func() { first <- s.TakeSnapshot(t.Context()) }()
		synctest.Wait()
		go func() { second <- s.TakeSnapshot(t.Context()) }()
		proposeN(t, h, "b", 5)
		time.Sleep(time.Minute) // in virtual time
		if now, still := h.CheckSingleLeader(); now != leader || still != term {
			t.Fatalf("leader was %d of term %d, is %d of %d", leader, term, now, still)
		}
		applied := s.Status().Applied
		close(hold)
		if err := errors.Join(<-first, <-second); err != nil {
			t.Fatal(err)
		}
		if st := s.Status(); st.Snapshot < applied {
			t.Fatalf("snapshot ends at %d, entry %d was applied before it was asked for", st.Snapshot, applied)
		}
		j := journalOf(h, leader)
		if a, b := j.snapshots.Load(), j.closes.Load(); a != 2 || b != 2 {
			t.Fatalf("%d snapshots, %d of them closed; want 2 and 2", a, b)
		}
	}, WithStateMachine(func() StateMachine {
		if hold == nil {
			hold = make(chan struct{}) // in the bubble
		}
		return &journal{hold: hold}
	}))
}

// A Snapshot or a WriteTo that fails or panics is reported, and changes nothing.
func TestSnapshotFails(t *testing.T) {
	for _, where := range []string{"Snapshot", "Snapshot panic", "WriteTo", "WriteTo panic"} {
		t.Run(where, func(t *testing.T) {
			var fault atomic.Pointer[string]
			snapshots(t, 1, func(t *testing.T, h *Harness) {
				proposeN(t, h, "a", 5)
				fault.Store(&where)
				var failed *SnapshotError
				err := h.Server(0).TakeSnapshot(t.Context())
				if !errors.As(err, &failed) || failed.Op != strings.Fields(where)[0] || strings.Contains(where, "panic") != (failed.Stack != "") {
					t.Fatalf("TakeSnapshot returned %v", err)
				}
				proposeN(t, h, "b", 5)
				if st := h.Server(0).Status(); st.Snapshot != 0 || st.First != 1 {
					t.Fatalf("log begins at %d, snapshot ends at %d", st.First, st.Snapshot)
				}
				fault.Store(nil)
				h.TakeSnapshot(0)
				h.CrashPeer(0)
				h.RestartPeer(0)
				proposeN(t, h, "c", 5)
			}, WithStateMachine(func() StateMachine { return &journal{fault: &fault} }))
		})
	}
}

// A WriteTo that hangs holds up nothing but further snapshots, and ends with
// the node.
func TestSnapshotHangs(t *testing.T) {
	snapshots(t, 1, func(t *testing.T, h *Harness) {
		proposeN(t, h, "a", 5)
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		if err := h.Server(0).TakeSnapshot(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("TakeSnapshot returned %v", err)
		}
		proposeN(t, h, "b", 5)
		s, j := h.Server(0), journalOf(h, 0)
		if st := s.Status(); st.First != 1 || st.Snapshot != 0 {
			t.Fatalf("the log begins at %d before the snapshot is durable; the newest is said to end at %d", st.First, st.Snapshot)
		}
		h.CrashPeer(0)
		if n := j.closes.Load(); n != 1 {
			t.Fatalf("Close was called %d times", n)
		}
		if err := s.TakeSnapshot(t.Context()); !errors.Is(err, ErrStopped) {
			t.Fatalf("TakeSnapshot of a closed node returned %v", err)
		}
	}, WithStateMachine(func() StateMachine { return &journal{hold: make(chan struct{})} }))
}

// A Restore that fails stops applying on that node alone. It still votes and
// replicates, and a restart tries again.
func TestRestoreFails(t *testing.T) {
	for _, where := range []string{"Restore", "Restore panic"} {
		t.Run(where, func(t *testing.T) {
			var fault atomic.Pointer[string]
			snapshots(t, 3, func(t *testing.T, h *Harness) {
				leader, behind := leaveBehind(t, h)
				fault.Store(&where)
				h.ReconnectPeer(behind)
				var failed *SnapshotError
				h.eventually(func() bool { return h.Server(behind).Status().Err != nil })
				if err := h.Server(behind).Status().Err; !errors.As(err, &failed) || failed.Op != "Restore" {
					t.Fatalf("Status says %v", err)
				}
				h.CrashPeer((leader + 2) % 3) // it is needed for a majority now
				if _, err := h.Server(leader).Propose(t.Context(), []byte("b")); err != nil {
					t.Fatal(err)
				}
				h.RestartPeer((leader + 2) % 3)
				fault.Store(nil)
				h.CrashPeer(behind)
				h.RestartPeer(behind)
				caughtUp(t, h, behind)
			}, WithStateMachine(func() StateMachine { return &journal{fault: &fault} }))
		})
	}
}

// A transfer that is cut goes on where it broke off.
func TestSnapshotResumes(t *testing.T) {
	const size = 20 << 20
	snapshots(t, 3, func(t *testing.T, h *Harness) {
		leader, behind := leaveBehind(t, h)
		h.ReconnectPeer(behind)
		var sent int64
		status := func() FollowerStatus {
			for _, f := range h.Server(leader).Status().Followers {
				if f.ID == h.Server(behind).Status().ID {
					return f
				}
			}
			return FollowerStatus{}
		}
		h.eventually(func() bool { sent = status().SnapshotSent; return sent > size/2 })
		if sent <= size/2 || status().SnapshotSize < size {
			t.Fatalf("sent %d of %d bytes", sent, status().SnapshotSize)
		}
		h.DisconnectPeer(behind)
		proposeN(t, h, "b", 3)
		h.ReconnectPeer(behind)
		lowest := int64(size)
		h.eventually(func() bool {
			if f := status(); f.SnapshotSent > 0 {
				lowest = min(lowest, f.SnapshotSent)
			}
			return journalOf(h, behind).restores.Load() == 1
		})
		if lowest < sent {
			t.Errorf("%d bytes were there, and it went on from %d", sent, lowest)
		}
		caughtUp(t, h, behind)
	}, WithStateMachine(func() StateMachine { return &journal{filler: size} }),
		WithConfig(func(_ int, c *Config) { c.KeepLogBytes = 1; c.MaxSnapshotBytesPerSecond = 16 << 20 }))
}

// slowJournal takes its time to apply, so that much is committed and not applied.
type slowJournal struct{ journal }

func (j *slowJournal) Apply(e Entry) []byte {
	<-time.After(time.Millisecond) // in virtual time
	return j.journal.Apply(e)
}

// A snapshot that is taken while more is committed than applied says what it
// includes: nothing is lost by a restart from it, nothing is applied twice.
func TestSnapshotSaysWhatItIncludes(t *testing.T) {
	lines := func(h *Harness) string {
		return string(h.Read(0, func(m StateMachine) []byte { return []byte(strings.Join(m.(*slowJournal).lines, " ")) }))
	}
	snapshots(t, 1, func(t *testing.T, h *Harness) {
		h.CheckSingleLeader()
		var all []*Proposal
		for i := range 60 {
			all = append(all, h.Server(0).Submit(fmt.Append(nil, i)))
			if i%4 != 3 {
				time.Sleep(500 * time.Microsecond) // it is applied in runs: more is committed while one runs
				continue
			}
			if st := h.Server(0).Status(); st.Applied >= st.Commit {
				t.Fatalf("everything is applied: %+v", st)
			}
			h.TakeSnapshot(0)
		}
		for _, p := range all {
			if _, err := p.Wait(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		want := lines(h)
		h.CrashPeer(0)
		h.RestartPeer(0)
		if _, err := h.Server(0).Propose(t.Context(), []byte("end")); err != nil {
			t.Fatal(err)
		}
		if got := lines(h); got != want+" end" {
			t.Fatalf("after the restart it has %q, want %q and end", got, want)
		}
	}, WithStateMachine(func() StateMachine { return &slowJournal{} }))
}

// Two connections bring snapshots at once. The core must know of the one that
// was stored first before the other may be stored: a storage keeps two, so a
// third would drop one that the core is about to restore. (Simulator, seed
// 99003566.)
func TestReceivedSnapshotIsNotedBeforeTheNext(t *testing.T) {
	storage := NewMemoryStorage()
	if _, err := storage.Open(t.Context(), Identity{}); err != nil {
		t.Fatal(err)
	}
	var in incomingSnapshot
	noted := 0
	for i := range Index(3) {
		meta := SnapshotMeta{ID: [16]byte{byte(i + 1)}, Last: EntryID{i + 5, 1}}
		a := &snapshotArgs{Meta: meta, Size: 4, Data: []byte("data")}
		_, done, err := in.take(storage, a, func() {
			noted++
			if in.mu.TryLock() {
				in.mu.Unlock()
				t.Errorf("snapshot %d is stored but not noted, and another may come", i)
			}
			if _, r, err := storage.OpenSnapshot(meta.Last); err != nil {
				t.Errorf("snapshot %d is to be noted: %v", i, err)
			} else {
				r.Close()
			}
		})
		if err != nil || !done {
			t.Fatalf("snapshot %d: done %v, %v", i, done, err)
		}
	}
	if noted != 3 {
		t.Errorf("%d of 3 snapshots were noted", noted)
	}
}

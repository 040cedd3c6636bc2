package raft

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"example.com/raft/internal/vfs"
)

// bulky makes commands of 16 KiB: a segment of 1 MiB holds some sixty.
func bulky(k int) []byte {
	b := make([]byte, 16<<10)
	binary.LittleEndian.PutUint64(b, uint64(k))
	return b
}

// writer proposes bulky commands at some nodes, one after the other, and keeps
// what it was told.
type writer struct {
	next     int
	answered map[int]Index
	rejected map[int]error
	unknown  int
	lastAt   time.Time     // of the newest answer
	gap      time.Duration // the longest time without one
}

func newWriter() *writer {
	return &writer{answered: map[int]Index{}, rejected: map[int]error{}, lastAt: time.Now()}
}

// write proposes one command at node i.
func (w *writer) write(h *Harness, i int) error {
	k := w.next
	w.next++
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	r, err := h.Server(i).Propose(ctx, bulky(k))
	switch {
	case err == nil:
		w.answered[k] = r.Index
		w.gap = max(w.gap, time.Since(w.lastAt))
		w.lastAt = time.Now()
	case errors.Is(err, ErrOutcomeUnknown):
		w.unknown++
	default:
		w.rejected[k] = err
	}
	return err
}

// check: what was answered is in the log of all nodes where it was said to be,
// what was rejected is in none.
func (w *writer) check(t *testing.T, h *Harness) {
	t.Helper()
	h.CheckLogsMatch()
	for k, index := range w.answered {
		if _, at := h.CheckCommitted(bulky(k)); at != index {
			t.Errorf("command %d was answered with entry %d and is entry %d", k, index, at)
		}
	}
	for k, err := range w.rejected {
		h.CheckNotCommitted(bulky(k))
		if !errors.Is(err, ErrDiskFull) && !errors.Is(err, ErrNoLeader) {
			t.Errorf("command %d was rejected with %v", k, err)
		}
	}
}

func diskFull(h *Harness, i int) bool { return h.Server(i).Status().DiskFull }

// The disk of the leader becomes full under load, and has space again later. The
// leadership moves to a node with space before a write fails, the full node goes
// on voting and replicating as far as it has claimed space, and catches up
// without being restarted.
func TestLeaderDiskFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := NewHarness(t, 3)
		defer h.Shutdown()
		old, _ := h.CheckSingleLeader()
		w := newWriter()
		for range 10 {
			w.write(h, old)
		}
		h.FillDisk(old)
		full := time.Now()
		third := (old + 1) % 3
		for k := range 200 {
			if err := w.write(h, (old+1+k%2)%3); err != nil {
				t.Fatalf("write %d failed: %v", w.next-1, err)
			}
		}
		if !h.eventually(func() bool { return errors.Is(w.write(h, old), ErrDiskFull) }) {
			t.Error("a node that has no room for what others write takes proposals, whose results it would not see")
		}
		leader, _ := h.CheckSingleLeader()
		if leader == old || !diskFull(h, old) || diskFull(h, leader) {
			t.Fatalf("node %d leads (before: %d), full: %v and %v", leader, old, diskFull(h, old), diskFull(h, leader))
		}
		if st := h.Server(leader).Status(); !slices.ContainsFunc(st.Followers, func(f FollowerStatus) bool {
			return f.ID == h.Server(old).conf.ID && f.DiskFull && f.Match < st.Last
		}) {
			t.Errorf("the leader does not know that a follower is full and behind: %+v", st.Followers)
		}
		t.Logf("the longest time without an answer, in %v: %v", time.Since(full), w.gap)
		if w.gap > 2*time.Second {
			t.Errorf("no write was answered for %v", w.gap)
		}
		h.FreeDisk(old)
		if err := w.write(h, third); err != nil {
			t.Error(err)
		}
		h.CheckCommittedN(bulky(w.next-1), 3)
		if diskFull(h, old) {
			t.Error("with space again the node says that its disk is full")
		}
		w.check(t, h)
		h.Transfer(old)
	})
}

// A full follower acknowledges no entry that it has no space for, is not sent
// any in vain, votes, does not campaign, and catches up.
func TestFollowerDiskFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := NewHarness(t, 3)
		defer h.Shutdown()
		leader, term := h.CheckSingleLeader()
		full, other := (leader+1)%3, (leader+2)%3
		w := newWriter()
		h.FillDisk(full)
		for range 150 {
			if err := w.write(h, leader); err != nil {
				t.Fatal(err)
			}
		}
		behind := h.Server(full).Status()
		if !behind.DiskFull || behind.Last >= h.Server(leader).Status().Last || behind.Durable != behind.Last {
			t.Fatalf("a full follower: %+v", behind)
		}
		// Nothing is sent to it in vain: appends to it stop.
		seq := func() (n uint64) {
			h.Server(leader).cm.step(func(c *core) { n = c.appendSeq })
			return n
		}
		before := seq()
		time.Sleep(time.Minute)
		if sent := seq() - before; sent > 5 {
			t.Errorf("%d appends were sent in a minute in which nothing was written", sent)
		}
		// It votes: without the leader the other one needs its vote. It does not
		// stand for election itself, and both together can't write.
		h.DisconnectPeer(leader)
		next, nextTerm := h.CheckSingleLeader()
		if next != other || nextTerm <= term {
			t.Fatalf("node %d leads in term %d; %d is full, and %d led", next, nextTerm, full, leader)
		}
		if err := w.write(h, other); err == nil {
			t.Error("a write was acknowledged by a majority of which one has no space")
		}
		h.FreeDisk(full)
		if !h.eventually(func() bool { return w.write(h, other) == nil }) {
			t.Fatal("with space again nothing is committed")
		}
		h.ReconnectPeer(leader)
		h.CheckCommittedN(bulky(w.next-1), 3)
		w.check(t, h)
	})
}

// All disks are full: whoever leads goes on and serves reads, and writes are
// refused before they are staged, with ErrDiskFull, on all nodes. With space
// again writes resume by themselves.
func TestAllDisksFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := NewHarness(t, 3)
		defer h.Shutdown()
		h.CheckSingleLeader()
		w := newWriter()
		for i := range 3 {
			h.FillDisk(i)
		}
		for i := 0; w.rejected[w.next-1] == nil; i++ {
			if i == 1000 {
				t.Fatal("1000 writes found space on a full disk")
			}
			w.write(h, i%3)
		}
		if !h.eventually(func() bool { return diskFull(h, 0) && diskFull(h, 1) && diskFull(h, 2) }) {
			// Each has noticed once its own log needed a segment.
			t.Fatalf("full: %v %v %v", diskFull(h, 0), diskFull(h, 1), diskFull(h, 2))
		}
		leader, term := h.CheckSingleLeader()
		last := h.Server(leader).Status().Last
		for i := range 3 {
			if err := w.write(h, i); !errors.Is(err, ErrDiskFull) || errors.Is(err, ErrOutcomeUnknown) {
				t.Errorf("a write at node %d: %v", i, err)
			}
			if _, err := h.Server(i).ReadIndex(t.Context()); err != nil {
				t.Errorf("a read at node %d: %v", i, err)
			}
		}
		time.Sleep(time.Minute)
		if now, nowTerm := h.CheckSingleLeader(); now != leader || nowTerm != term {
			t.Errorf("node %d leads in term %d, and %d in term %d did", now, nowTerm, leader, term)
		}
		if st := h.Server(leader).Status(); st.Last != last {
			t.Errorf("rejected writes were appended: the log ends at %d, before at %d", st.Last, last)
		}
		var transfer *TransferError
		if err := h.Server(leader).TransferLeadership(t.Context(), h.Server((leader+1)%3).conf.ID); !errors.As(err, &transfer) || transfer.Reason != TransferDiskFull {
			t.Errorf("transfer to a full node: %v", err)
		}
		freed := time.Now()
		for i := range 3 {
			h.FreeDisk(i)
		}
		if !h.eventually(func() bool { return w.write(h, leader) == nil }) {
			t.Fatal("with space again nothing is committed")
		}
		t.Logf("writes resumed %v after the disks were freed", time.Since(freed))
		h.CheckCommittedN(bulky(w.next-1), 3)
		w.check(t, h)
	})
}

// Most of the others are full: a leader with space refuses what could not be
// committed.
func TestMajorityFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := NewHarness(t, 3)
		defer h.Shutdown()
		leader, _ := h.CheckSingleLeader()
		w := newWriter()
		h.FillDisk((leader + 1) % 3)
		h.FillDisk((leader + 2) % 3)
		for i := 0; w.rejected[w.next-1] == nil && i < 1000; i++ {
			w.write(h, leader)
		}
		if err := w.rejected[w.next-1]; !errors.Is(err, ErrDiskFull) {
			t.Fatalf("a write without a majority that has space: %v", err)
		}
		h.FreeDisk((leader + 1) % 3)
		if !h.eventually(func() bool { return w.write(h, leader) == nil }) {
			t.Fatal("with space at a majority nothing is committed")
		}
		h.FreeDisk((leader + 2) % 3)
		w.check(t, h)
	})
}

// A node is killed while its disk is full, and starts again there.
func TestRestartOnFullDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := NewHarness(t, 3)
		defer h.Shutdown()
		leader, _ := h.CheckSingleLeader()
		full := (leader + 1) % 3
		w := newWriter()
		h.FillDisk(full)
		for range 150 {
			w.write(h, leader)
		}
		h.CrashPeer(full)
		h.RestartPeer(full)
		if !h.eventually(func() bool { return diskFull(h, full) }) {
			t.Error("after the restart the node does not say that its disk is full")
		}
		if err := w.write(h, leader); err != nil {
			t.Error(err)
		}
		h.FreeDisk(full)
		h.CheckCommittedN(bulky(w.next-1), 3)
		w.check(t, h)
	})
}

// A sole voter on a full disk still leads, because nobody else could serve reads.
func TestOnlyNodeDiskFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := NewHarness(t, 1)
		defer h.Shutdown()
		h.CheckSingleLeader()
		w := newWriter()
		h.FillDisk(0)
		for i := 0; w.rejected[w.next-1] == nil && i < 1000; i++ {
			w.write(h, 0)
		}
		h.CrashPeer(0)
		h.RestartPeer(0)
		h.CheckSingleLeader()
		if _, err := h.Server(0).ReadIndex(t.Context()); err != nil {
			t.Error(err)
		}
		if err := w.write(h, 0); !errors.Is(err, ErrDiskFull) {
			t.Errorf("a write: %v", err)
		}
		h.FreeDisk(0)
		if !h.eventually(func() bool { return w.write(h, 0) == nil }) {
			t.Error("with space again nothing is committed")
		}
		w.check(t, h)
	})
}

// A snapshot that finds no space leaves no half file and is tried again, and one
// that finds some lets the log go, which makes space for the log.
func TestSnapshotOnFullDisk(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		state := 3 << 20 // of the snapshot
		h := NewHarness(t, 3, WithStateMachine(func() StateMachine { return &sized{n: state} }), WithConfig(func(_ int, c *Config) {
			c.SnapshotEveryBytes, c.KeepLogBytes = 2<<20, 1<<30
		}))
		defer h.Shutdown()
		leader, _ := h.CheckSingleLeader()
		follower := (leader + 1) % 3
		mem := h.nodes[follower].disk.mem
		w := newWriter()
		for range 140 { // more than 2 MiB
			if err := w.write(h, leader); err != nil {
				t.Fatal(err)
			}
		}
		if !h.eventually(func() bool { return h.Server(follower).Status().Snapshot > 0 }) {
			t.Fatal("no snapshot was taken")
		}
		h.FillDisk(follower)
		taken := h.Server(follower).Status()
		for i := 0; !diskFull(h, follower); i++ {
			if i > 1000 || w.write(h, leader) != nil {
				t.Fatal("the disk was to be full")
			}
		}
		// The log up to the snapshot goes at once, although it was to be kept, and
		// its files are space for what comes.
		if !h.eventually(func() bool { return h.Server(follower).Status().First > taken.Snapshot }) {
			t.Fatalf("a full node keeps what its snapshot includes: %+v", h.Server(follower).Status())
		}
		// Without space for a further snapshot there is no half file.
		before := h.Server(follower).Status().Snapshot
		for range 400 {
			w.write(h, leader)
		}
		time.Sleep(10 * time.Second)
		names, err := mem.List("data/snap")
		if err != nil || slices.ContainsFunc(names, func(n string) bool { return len(n) > 4 && n[len(n)-4:] == ".tmp" }) {
			t.Errorf("files: %v, %v", names, err)
		}
		t.Logf("snapshot up to %d, then %d; files %v", before, h.Server(follower).Status().Snapshot, names)
		h.FreeDisk(follower)
		time.Sleep(2 * time.Minute) // the pause between attempts is a minute at most
		if got := h.Server(follower).Status().Snapshot; got <= before {
			t.Errorf("with space again no snapshot was taken: the newest ends at %d", got)
		}
		w.check(t, h)
	})
}

// sized is a state machine whose snapshots have a size.
type sized struct{ n int }

func (*sized) Apply(e Entry) []byte { return e.Data[:8] }
func (m *sized) Snapshot() (Capture, error) {
	return CaptureBytes(make([]byte, m.n)), nil
}
func (*sized) Restore(r io.Reader) error { _, err := io.Copy(io.Discard, r); return err }

// What fails for lack of space inside of a claimed segment, as on a file system
// that copies on write, is a failed write: the node stops.
func TestNoSpaceInsideSegment(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := NewHarness(t, 3)
		defer h.Shutdown()
		leader, _ := h.CheckSingleLeader()
		victim := (leader + 1) % 3
		var once sync.Once
		h.nodes[victim].disk.mem.SetHook(func(op vfs.Op) (err error) {
			if op.Kind == vfs.OpWrite && op.Offset > 0 {
				once.Do(func() { err = syscall.ENOSPC })
			}
			return err
		})
		h.Server(leader).Propose(t.Context(), []byte("x"))
		<-h.Server(victim).Done()
		if err := h.Server(victim).Err(); !errors.Is(err, syscall.ENOSPC) || errors.Is(err, ErrDiskFull) {
			t.Errorf("the node ended with %v", err)
		}
		h.CrashPeer(victim)
		h.RestartPeer(victim)
		h.CheckCommittedN([]byte("x"), 3)
	})
}

// TestDiskFullUnderLoad fills the leader's disk under load from several clients
// and frees it again, with other dice each time: nothing is lost, no node is
// restarted, and the time without an answer is that of a transfer.
func TestDiskFullUnderLoad(t *testing.T) {
	t.Parallel()
	var gaps []time.Duration
	for seed := range uint64(seedCount(20)) {
		synctest.Test(t, func(t *testing.T) {
			h := NewHarness(t, 3, WithSeed(seed+1))
			defer h.Shutdown()
			h.Delay(time.Millisecond, 20*time.Millisecond)
			leader, _ := h.CheckSingleLeader()
			stop := make(chan struct{})
			var mu sync.Mutex
			var told []Result
			var when []time.Time
			var wg sync.WaitGroup
			for c := range 6 {
				wg.Go(func() {
					for k := 0; !isClosed(stop); k++ {
						cmd := append(fmt.Appendf(nil, "%d/%d ", c, k), make([]byte, 8<<10)...)
						r, err := h.Server(c%3).Propose(t.Context(), cmd)
						if err != nil && !errors.Is(err, ErrDiskFull) {
							t.Errorf("client %d: %v", c, err)
						}
						if err == nil {
							mu.Lock()
							told, when = append(told, r), append(when, time.Now())
							mu.Unlock()
						}
						time.Sleep(time.Duration(3*c+3) * time.Millisecond)
					}
				})
			}
			time.Sleep(200 * time.Millisecond)
			h.FillDisk(leader)
			time.Sleep(5 * time.Second)
			h.FreeDisk(leader)
			time.Sleep(3 * time.Second)
			close(stop)
			wg.Wait()
			gap := time.Duration(0)
			for i := 1; i < len(when); i++ {
				gap = max(gap, when[i].Sub(when[i-1]))
			}
			gaps = append(gaps, gap)
			if now, _ := h.CheckSingleLeader(); now == leader {
				t.Errorf("seed %d: node %d leads again", seed, now)
			}
			h.CheckLogsMatch()
			at := map[Index]bool{}
			for _, r := range told {
				if at[r.Index] {
					t.Errorf("seed %d: two commands were answered with entry %d", seed, r.Index)
				}
				at[r.Index] = true
			}
		})
	}
	slices.Sort(gaps)
	t.Logf("longest time without an answer in %d runs: median %v, at most %v", len(gaps), gaps[len(gaps)/2], gaps[len(gaps)-1])
	if gaps[len(gaps)-1] > 3*time.Second {
		t.Errorf("no write was answered for %v", gaps[len(gaps)-1])
	}
}

// A server whose disk is full does not campaign, neither when its timer fires nor
// when a leader asks it to, and hands leadership to one that has space.
func TestFullDoesNotCampaign(t *testing.T) {
	c := readLeader(t, 3, false)
	c.diskSpace(ErrDiskFull)
	if c.transfer.to == 0 {
		t.Fatal("a leader with a full disk hands leadership to nobody")
	}
	if c.outOfSpace() || c.hasRoom() {
		t.Error("proposals do not wait for the one that takes over")
	}
	c.transfer = transfer{}
	for _, p := range c.progress {
		c.onAppendReply(p.id, &appendArgs{Term: c.currentTerm, Heartbeat: true}, &appendReply{Term: c.currentTerm, Success: true, Full: true})
	}
	c.heartbeat()
	if c.finish(); c.role != Leader || c.transfer.to != 0 || !c.outOfSpace() {
		t.Fatalf("where all are full the leader is %v, hands over to %d, and takes proposals: %v", c.role, c.transfer.to, !c.outOfSpace())
	}
	c.stepDown(ReasonStuck)
	term := c.currentTerm
	for range 5 {
		c.now = c.electionDeadline
		c.tick()
		c.finish()
	}
	c.onAppendRequest(&appendArgs{Term: term, Leader: 2, Prev: EntryID{c.log.start.Index, c.log.start.Term}, Heartbeat: true, Campaign: true}, nil)
	if c.finish(); c.currentTerm != term || c.campaign != nil || c.role != Follower {
		t.Fatalf("it campaigns with a full disk: term %d, was %d, %v", c.currentTerm, term, c.role)
	}
	c.diskSpace(nil)
	c.now = c.electionDeadline
	if c.tick(); c.campaign == nil {
		t.Error("with space again it does not campaign")
	}
}

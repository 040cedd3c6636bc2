package raft

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"example.com/raft/internal/vfs"
)

// Snapshots of real servers while something else goes on or goes wrong.

// transferTo returns what the leader knows of the snapshot it sends a node.
func transferTo(h *Harness, leader, i int) (sent, size int64) {
	for _, f := range h.Server(leader).Status().Followers {
		if f.ID == h.Server(i).Status().ID {
			return f.SnapshotSent, f.SnapshotSize
		}
	}
	return 0, 0
}

// midTransfer waits until some of a snapshot is at node i and some is not.
func midTransfer(t *testing.T, h *Harness, leader, i int) {
	t.Helper()
	var sent, size int64
	h.eventually(func() bool {
		sent, size = transferTo(h, leader, i)
		return sent > 0
	})
	if sent == 0 || sent > size*3/4 {
		t.Fatalf("%d of %d bytes are sent", sent, size)
	}
}

// largeState makes snapshots of 20 MiB that take ten seconds to send.
func largeState() []HarnessOption {
	return []HarnessOption{
		WithStateMachine(func() StateMachine { return &journal{filler: 20 << 20} }),
		WithConfig(func(_ int, c *Config) { c.KeepLogBytes = 1; c.MaxSnapshotBytesPerSecond = 2 << 20 }),
	}
}

// While a snapshot is sent, heartbeats and appends flow: the leader and the
// term stay, and commands commit as fast as ever.
func TestHeartbeatsBesideTransfer(t *testing.T) {
	snapshots(t, 3, func(t *testing.T, h *Harness) {
		leader, behind := leaveBehind(t, h)
		_, term := h.CheckSingleLeader()
		h.ReconnectPeer(behind)
		midTransfer(t, h, leader, behind)
		for i := range 20 {
			began := time.Now()
			if _, err := h.Server(leader).Propose(t.Context(), fmt.Append(nil, "during ", i)); err != nil {
				t.Fatal(err)
			}
			if took := time.Since(began); took > 50*time.Millisecond {
				t.Errorf("a command took %v", took)
			}
			time.Sleep(150 * time.Millisecond)
		}
		if sent, size := transferTo(h, leader, behind); sent == 0 || sent == size {
			t.Errorf("the transfer is over: %d of %d bytes", sent, size)
		}
		if now, still := h.CheckSingleLeader(); now != leader || still != term {
			t.Fatalf("leader was %d of term %d, is %d of %d", leader, term, now, still)
		}
		if st := h.Server(behind).Status(); st.Term != term || st.Leader != h.Server(leader).Status().ID {
			t.Errorf("the receiver is in term %d and follows %q", st.Term, st.Leader)
		}
		caughtUp(t, h, behind)
	}, largeState()...)
}

// A slow transfer, writes all the while and snapshots every few KB: the log is
// kept behind the snapshot that is on its way and no longer, and the follower
// catches up once the writes pause.
func TestThrottledFollowerAndCompaction(t *testing.T) {
	const perSecond, state = 64 << 10, 200 << 10 // a transfer takes about 3 s
	snapshots(t, 3, func(t *testing.T, h *Harness) {
		leader, behind := leaveBehind(t, h)
		h.ReconnectPeer(behind)
		var longest, written Index
		transfers, before := int32(0), h.Server(leader).Status().Last
		for began := time.Now(); time.Since(began) < 30*time.Second; {
			if _, err := h.Server(leader).Propose(t.Context(), bytes.Repeat([]byte("w"), 100)); err != nil {
				t.Fatal(err)
			}
			time.Sleep(10 * time.Millisecond)
			st := h.Server(leader).Status()
			longest, written = max(longest, st.Last-st.First+1), st.Last-before
			transfers = journalOf(h, behind).restores.Load()
		}
		if limit := written / 2; longest > limit || transfers == 0 {
			t.Errorf("%d entries were written, %d of them were kept at a time, %d snapshots arrived", written, longest, transfers)
		}
		caughtUp(t, h, behind)
		h.TakeSnapshot(leader)
		if st := h.Server(leader).Status(); st.First < st.Last {
			t.Errorf("the log is kept from %d to %d, and nobody needs it", st.First, st.Last)
		}
		t.Logf("%d entries written, %d kept at most, %d transfers", written, longest, transfers)
	}, WithStateMachine(func() StateMachine { return &journal{filler: state} }),
		WithConfig(func(_ int, c *Config) {
			c.KeepLogBytes, c.SnapshotEveryBytes, c.MaxSnapshotBytesPerSecond = 1, 4<<10, perSecond
		}))
}

// temporaryFiles returns the unfinished snapshots on a node's disk.
func temporaryFiles(t *testing.T, h *Harness, i int) (tmp []string) {
	t.Helper()
	names, err := h.node(i).disk.mem.List("data/snap")
	if err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(names, func(name string) bool { return !strings.HasSuffix(name, ".tmp") })
}

// A leader or a follower that is closed during a transfer leaves no goroutine
// and no open file, and no unfinished snapshot; one that crashes leaves what the
// next start removes. The follower catches up afterwards.
func TestStopDuringTransfer(t *testing.T) {
	for _, role := range []Role{Leader, Follower} {
		for _, crash := range []bool{false, true} {
			t.Run(fmt.Sprintf("%v, crash %v", role, crash), func(t *testing.T) {
				virtual(t, 3, func(t *testing.T, h *Harness) {
					leader, behind := leaveBehind(t, h)
					h.ReconnectPeer(behind)
					midTransfer(t, h, leader, behind)
					victim := behind
					if role == Leader {
						victim = leader
					}
					if crash {
						h.CrashPeer(victim)
					} else {
						s := h.Server(victim)
						if err := s.Close(); err != nil || !isClosed(s.Done()) {
							t.Fatalf("Close: %v", err)
						}
						if n := h.node(victim).disk.openFiles(); n > 0 {
							t.Errorf("%d files are open", n)
						}
						if tmp := temporaryFiles(t, h, victim); len(tmp) > 0 {
							t.Errorf("%v are left", tmp)
						}
						h.CrashPeer(victim) // for the harness it is down
					}
					if role == Follower {
						proposeN(t, h, "b", 3)
					}
					left := temporaryFiles(t, h, victim)
					h.RestartPeer(victim)
					for _, name := range temporaryFiles(t, h, victim) {
						if slices.Contains(left, name) && victim == leader {
							t.Errorf("%s is left after the restart", name)
						}
					}
					caughtUp(t, h, behind)
					h.TakeSnapshot(behind) // it may have caught up without the one that it has a part of
					if tmp := temporaryFiles(t, h, behind); len(tmp) > 0 {
						t.Errorf("%v are left after it caught up", tmp)
					}
				}, largeState()...)
			})
		}
	}
}

// deaf is a journal whose WriteTo ignores its context.
type deaf struct {
	journal
	entered, release chan struct{}
}

func (d *deaf) Snapshot() (Capture, error) {
	return CaptureFunc(func(context.Context, io.Writer) error {
		close(d.entered)
		<-d.release
		return nil
	}), nil
}

// Close during a WriteTo that does not return says so, leaves nothing but its
// goroutine, and Done closes with it.
func TestCloseWhileWriteToHangs(t *testing.T) {
	var d *deaf
	virtual(t, 1, func(t *testing.T, h *Harness) {
		proposeN(t, h, "a", 5)
		s := h.Server(0)
		answer := make(chan error, 1)
		go func() { answer <- s.TakeSnapshot(t.Context()) }()
		<-d.entered
		still := stillRunning(t, s, 1, closeBound)
		if !still.Snapshot || still.Apply != 0 || still.Flush || !strings.Contains(still.Error(), "WriteTo") {
			t.Errorf("Close says %+v: %v", *still, still)
		}
		if err := <-answer; !errors.Is(err, ErrStopped) {
			t.Errorf("TakeSnapshot: %v", err)
		}
		close(d.release)
		<-s.Done()
		if err := s.Close(); err != nil {
			t.Errorf("Close, again: %v", err)
		}
		if tmp := temporaryFiles(t, h, 0); len(tmp) > 0 {
			t.Errorf("%v are left", tmp)
		}
		h.CrashPeer(0)
		h.RestartPeer(0)
		proposeN(t, h, "b", 3)
	}, WithStateMachine(func() StateMachine {
		d = &deaf{entered: make(chan struct{}), release: make(chan struct{})}
		return d
	}))
}

// A receiver that can't store a block refuses it, and the rest of the transfer
// is not taken for anything else: the follower follows on, and the transfer
// begins again when the disk is well.
func TestRefusedBlocks(t *testing.T) {
	for _, kind := range []vfs.OpKind{vfs.OpCreate, vfs.OpWrite, vfs.OpSync, vfs.OpRename} {
		t.Run(kind.String(), func(t *testing.T) {
			snapshots(t, 3, func(t *testing.T, h *Harness) {
				leader, behind := leaveBehind(t, h)
				_, term := h.CheckSingleLeader()
				var refused atomic.Int32
				h.node(behind).disk.mem.SetHook(func(op vfs.Op) error {
					if op.Kind == kind && strings.Contains(op.Name, ".snap") && refused.Load() < 3 {
						refused.Add(1)
						return errors.New("no space left on device")
					}
					return nil
				})
				h.ReconnectPeer(behind)
				caughtUp(t, h, behind)
				if n := refused.Load(); n != 3 {
					t.Errorf("%d blocks were refused", n)
				}
				if now, still := h.CheckSingleLeader(); now != leader || still != term {
					t.Errorf("leader was %d of term %d, is %d of %d", leader, term, now, still)
				}
				if tmp := temporaryFiles(t, h, behind); len(tmp) > 0 {
					t.Errorf("%v are left", tmp)
				}
			}, WithStateMachine(func() StateMachine { return &journal{filler: 5 << 20} }))
		})
	}
}

// FuzzSnapshotBlock: what a sender of blocks, or a snapshot's header on disk,
// may hold never panics, and is accepted only if it is what encode writes.
func FuzzSnapshotBlock(f *testing.F) {
	meta := snapshotUpTo(7, 2, 3)
	f.Add(meta.encode(nil))
	f.Add(encodeBody(&snapshotArgs{Term: 3, Leader: 2, Meta: meta, Size: 10, Offset: 4, Data: []byte("abcdef")}))
	f.Add(encodeBody(&snapshotArgs{Term: 3, Leader: 2, Meta: meta}))
	meta.ConfigIndex = meta.Last.Index + 1 // the configuration of an entry that it does not include
	f.Add(meta.encode(nil))
	f.Fuzz(func(t *testing.T, in []byte) {
		if m, err := decodeSnapshotMeta(in); err == nil {
			if out := m.encode(nil); !bytes.Equal(out, in) {
				t.Fatalf("header %x was read, and encodes to %x", in, out)
			}
			if m.Last.Index == 0 || m.ConfigIndex > m.Last.Index {
				t.Fatalf("header of %v, configuration at %d", m.Last, m.ConfigIndex)
			}
		}
		var a snapshotArgs
		if err := a.decode(in); err != nil {
			return
		}
		if out := encodeBody(&a); !bytes.Equal(out, in) {
			t.Fatalf("block %x was read, and encodes to %x", in, out)
		}
		if a.Offset > a.Size || uint64(len(a.Data)) > a.Size-a.Offset || a.Meta.Last.Term > a.Term {
			t.Fatalf("block of %d bytes at %d of %d, up to %v, in term %d", len(a.Data), a.Offset, a.Size, a.Meta.Last, a.Term)
		}
	})
}

package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/hashicorp/go-hclog"
	hraft "github.com/hashicorp/raft"
	hwal "github.com/hashicorp/raft-wal"
	"github.com/hashicorp/raft-wal/metadb"
	"go.etcd.io/etcd/server/v3/etcdserver/api/snap"
	"go.etcd.io/etcd/server/v3/storage/wal"
	"go.etcd.io/etcd/server/v3/storage/wal/walpb"
	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"
)

// other is another library's system, and how to read a stopped node's log.
type other struct {
	name string
	new  func() System
	read func(t *testing.T, home string) [][]byte
}

func others() []other {
	return []other{
		{"hashicorp", func() System { return newHashicorp() }, readHashicorp},
		{"etcd", func() System { return newEtcd(false) }, readEtcd},
		{"etcd-packed", func() System { return newEtcd(true) }, readEtcdPacked},
	}
}

func readHashicorp(t *testing.T, home string) [][]byte {
	meta := &metadb.BoltMetaDB{}
	l, err := hwal.Open(home, hwal.WithMetaStore(meta), hwal.WithLogger(hclog.NewNullLogger()))
	if err != nil {
		t.Fatal(err)
	}
	last, err := l.LastIndex()
	if err != nil {
		t.Fatal(err)
	}
	var commands [][]byte
	for i := uint64(1); i <= last; i++ {
		var e hraft.Log
		if err := l.GetLog(i, &e); err != nil {
			t.Fatal(err)
		}
		if e.Type == hraft.LogCommand {
			commands = append(commands, e.Data)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if err := meta.Close(); err != nil {
		t.Fatal(err)
	}
	return commands
}

func readEtcd(t *testing.T, home string) [][]byte {
	entries, err := etcdEntries(t, home)
	if err != nil {
		t.Fatal(err)
	}
	var commands [][]byte
	for _, e := range entries {
		if len(e.GetData()) > 0 {
			commands = append(commands, e.GetData())
		}
	}
	return commands
}

// etcdEntries reads a stopped node's log from its start on.
func etcdEntries(t *testing.T, home string) ([]*raftpb.Entry, error) {
	first := &walpb.Snapshot{Index: new(uint64(1)), Term: new(uint64(1))}
	w, err := wal.OpenForRead(zap.NewNop(), filepath.Join(home, "wal"), first)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close() // always an error when opened for reading: it has no directory to close
	_, _, entries, err := w.ReadAll()
	return entries, err
}

func readEtcdPacked(t *testing.T, home string) [][]byte {
	var commands [][]byte
	for _, e := range readEtcd(t, home) {
		for len(e) > 0 {
			end := 4 + int(binary.LittleEndian.Uint32(e))
			commands = append(commands, e[4:end])
			e = e[end:]
		}
	}
	return commands
}

func TestOtherSystems(t *testing.T) {
	const clients, each, size = 8, 25, 32
	payload := func(client, i int) string { return fmt.Sprintf("%-*s", size, fmt.Sprint(client, " ", i)) }
	for _, o := range others() {
		t.Run(o.name, func(t *testing.T) {
			before := runtime.NumGoroutine()
			dir, sys := t.TempDir(), o.new()
			if err := sys.Start(dir); err != nil {
				t.Fatal(err)
			}
			var wg sync.WaitGroup
			for c := range clients {
				wg.Go(func() {
					buf := make([]byte, size) // One for all, so a system that keeps it is found out.
					for i := range each {
						copy(buf, payload(c, i))
						if err := sys.Propose(context.Background(), buf); err != nil {
							t.Error(err)
						}
					}
				})
			}
			wg.Wait()
			ctx, cancel := context.WithCancel(context.Background())
			if err := sys.Propose(ctx, []byte(payload(0, each))); err != nil {
				t.Errorf("with a context that can be cancelled: %v", err)
			}
			cancel()
			if err := sys.Check(clients*each+1, size); err != nil {
				t.Error(err)
			}
			for _, wrong := range []error{sys.Check(clients*each, size), sys.Check(clients*each+2, size), sys.Check(clients*each+1, size+1)} {
				if wrong == nil {
					t.Error("Check takes a wrong number of commands or bytes")
				}
			}
			if err := sys.Stop(); err != nil {
				t.Error(err)
			}
			if err := sys.Propose(context.Background(), []byte("late")); err == nil {
				t.Error("a proposal after Stop is acknowledged")
			}
			if left := settle(before); left != 0 {
				t.Errorf("%d goroutines are left after Stop", left)
			}
			homes, err := filepath.Glob(filepath.Join(dir, "n*"))
			if err != nil || len(homes) != 3 {
				t.Fatalf("the nodes' directories are %v (%v), want three", homes, err)
			}
			copies := make(map[string]int)
			for _, home := range homes {
				for _, c := range o.read(t, home) {
					copies[string(c)]++
				}
			}
			for c := range clients {
				for i := range each {
					if n := copies[payload(c, i)]; n != 2 && n != 3 {
						t.Errorf("client %d's command %d is %d times in the logs of three nodes, want 2 or 3", c, i, n)
					}
				}
			}
		})
	}
}

func TestOtherSystemsEndWaitingProposals(t *testing.T) {
	for _, o := range others() {
		t.Run(o.name, func(t *testing.T) {
			sys := o.new()
			if err := sys.Start(t.TempDir()); err != nil {
				t.Fatal(err)
			}
			// They go on until Stop ends them. One that hangs fails by timeout.
			var wg sync.WaitGroup
			const clients = 64 // some of them wait at every moment
			began := make(chan struct{}, clients)
			for range clients {
				wg.Go(func() {
					err := sys.Propose(context.Background(), []byte("first"))
					began <- struct{}{}
					for err == nil {
						err = sys.Propose(context.Background(), []byte("more"))
					}
				})
			}
			for range clients {
				<-began
			}
			if err := sys.Stop(); err != nil {
				t.Error(err)
			}
			wg.Wait()
		})
	}
}

func TestEtcdPacksUpToItsLimit(t *testing.T) {
	b := &etcdBatch{}
	var want []int
	command := make([]byte, etcdPack/4-4) // four of them with their lengths fill an entry
	for i := range 9 {
		b.add(command, true)
		if i%4 == 0 {
			want = append(want, 0)
		}
		want[len(want)-1] = (i + 1) * etcdPack / 4
		if fmt.Sprint(b.ends) != fmt.Sprint(want) {
			t.Fatalf("after %d commands the entries end at %v, want %v", i+1, b.ends, want)
		}
	}
	for size, entries := range map[int]int{1: 1, 2: 2} {
		full := &etcdBatch{}
		full.add(make([]byte, etcdPack-4-5), true) // room for a length and one byte
		full.add(make([]byte, size), true)
		if len(full.ends) != entries {
			t.Errorf("with %d bytes more there are %d entries, want %d", size, len(full.ends), entries)
		}
	}
	b.add(make([]byte, 2*etcdPack), true)
	b.add([]byte("small"), true)
	var sizes []int
	for _, e := range b.entries() {
		sizes = append(sizes, len(e.Data))
	}
	if got, want := fmt.Sprint(sizes), fmt.Sprint([]int{etcdPack, etcdPack, etcdPack / 4, 2*etcdPack + 4, 9}); got != want {
		t.Errorf("entries of %s bytes, want %s", got, want)
	}
}

// newestSnapshot returns how many commands the newest durable snapshot of a
// stopped node has, and its index. The log must go on from there.
func newestSnapshot(t *testing.T, home string) (commands int64, index uint64) {
	t.Helper()
	dir := filepath.Join(home, "wal")
	known, err := wal.ValidSnapshotEntries(zap.NewNop(), dir)
	if err != nil {
		t.Fatal(err)
	}
	newest, err := snap.New(zap.NewNop(), filepath.Join(home, "snap")).LoadNewestAvailable(known)
	if err != nil {
		t.Fatal(err)
	}
	m := newest.GetMetadata()
	w, err := wal.OpenForRead(zap.NewNop(), dir, &walpb.Snapshot{Index: m.Index, Term: m.Term})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close() // as in etcdEntries
	if _, _, _, err := w.ReadAll(); err != nil {
		t.Errorf("reading the log from the newest snapshot on, index %d: %v", m.GetIndex(), err)
	}
	var c counts
	if err := c.decode(newest.GetData()); err != nil {
		t.Fatal(err)
	}
	return c.commands.Load(), m.GetIndex()
}

// etcdBefore is the index before that of the first command: the first snapshot
// has 1, and the leader's own entry follows it.
const etcdBefore = 2

func TestEtcdCompacts(t *testing.T) {
	s := newEtcd(false)
	s.keep, s.snapshot = 2<<10, 4<<10
	dir := t.TempDir()
	if err := s.Start(dir); err != nil {
		t.Fatal(err)
	}
	for range 200 {
		if err := s.Propose(context.Background(), make([]byte, 64)); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	const perKeep = 2 << 10 / (64 + etcdEntryCost)
	first, err := s.nodes[0].storage.FirstIndex()
	if err != nil || first < 200-2*perKeep || first > 200-perKeep+etcdBefore {
		t.Errorf("the leader keeps entries from %d on in memory (%v), want about one to two times %d", first, err, perKeep)
	}
	commands, index := newestSnapshot(t, filepath.Join(dir, "n1"))
	if index < 100 || commands != int64(index)-etcdBefore {
		t.Errorf("the newest snapshot has %d commands up to index %d, want one that is newer and has all", commands, index)
	}
}

// A follower that was away longer than the leader keeps entries in memory gets
// a snapshot, and then the log goes on.
func TestEtcdSnapshotReachesAFollower(t *testing.T) {
	s := newEtcd(false)
	s.inflight, s.keep = 4, 2<<10
	dir := t.TempDir()
	if err := s.Start(dir); err != nil {
		t.Fatal(err)
	}
	ops := int64(0)
	propose := func() {
		t.Helper()
		if err := s.Propose(context.Background(), make([]byte, 64)); err != nil {
			t.Fatal(err)
		}
		ops++
	}
	last := s.nodes[2]
	last.mu.Lock() // It can't look at what it is sent.
	for range 200 {
		propose()
	}
	last.mu.Unlock()
	for want := ops; last.commands.Load() < want; {
		if ops > 3000 {
			t.Fatalf("the follower has applied %d commands of %d", last.commands.Load(), ops)
		}
		propose()
	}
	if err := s.Check(ops, 64); err != nil {
		t.Error(err)
	}
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	if got, want := last.commands.Load(), int64(last.applied)-etcdBefore; got != want {
		t.Errorf("the follower's state has %d commands at index %d, want %d", got, last.applied, want)
	}
	// The entries that it got as a snapshot are not in its log.
	home := filepath.Join(dir, "n3")
	if _, err := etcdEntries(t, home); !errors.Is(err, wal.ErrSliceOutOfRange) {
		t.Errorf("reading the follower's log from its start: %v, want a gap", err)
	}
	if commands, index := newestSnapshot(t, home); index == 1 || commands != int64(index)-etcdBefore {
		t.Errorf("the follower's newest snapshot has %d commands up to index %d", commands, index)
	}
}

func TestCountsSurviveASnapshot(t *testing.T) {
	var c, d counts
	c.add(make([]byte, 7))
	c.add(make([]byte, 3))
	if err := d.decode(c.encode()); err != nil {
		t.Fatal(err)
	}
	if err := d.check(2, 5); err != nil {
		t.Error(err)
	}
	if err := d.decode([]byte("too short")); err == nil || !strings.Contains(err.Error(), "16") {
		t.Errorf("a snapshot of a wrong length: %v", err)
	}
}

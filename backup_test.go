package raft

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"example.com/raft/internal/snap"
	"example.com/raft/internal/vfs"
	"example.com/raft/internal/wal"
)

// memoryDir is a data directory in memory, whose storage starts no goroutine.
func memoryDir(fs vfs.FS) *diskStorage {
	rng := rand.New(rand.NewPCG(3, 3))
	return &diskStorage{
		fs: fs, dir: "node", tailBytes: 4096, random: func(b []byte) { b[0] = byte(1 + rng.IntN(255)) },
		options: wal.Options{MinSegmentBytes: 65536, MaxSegmentBytes: 65536, Rand: rng.Uint64, PrepareInline: true},
	}
}

// someBackup returns a backup of state.
func someBackup(t testing.TB, state string) []byte {
	t.Helper()
	h := backupHeader{taken: time.Unix(900, 5).UTC(), term: 9, cluster: "old", node: "a", meta: snapshotUpTo(7, 3, 2)}
	return streamOf(t, h.encode(), state)
}

func streamOf(t testing.TB, header []byte, state string) []byte {
	t.Helper()
	var b bytes.Buffer
	e, err := snap.NewEncoder(&b, header, 1)
	if err == nil {
		_, err = e.Write([]byte(state))
	}
	if err == nil {
		err = e.Finish()
	}
	if err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func restoreOptions() *RestoreOptions {
	return &RestoreOptions{ID: "n", Addr: "host:1", ClusterID: "new", FromCluster: "old"}
}

// backupOf takes a backup, which must read as Backup says.
func backupOf(t *testing.T, s *Server) ([]byte, BackupInfo) {
	t.Helper()
	var b bytes.Buffer
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	info, err := s.Backup(ctx, &b)
	if err != nil {
		t.Fatal(err)
	}
	read, err := VerifyBackup(bytes.NewReader(b.Bytes()))
	if err != nil {
		t.Fatalf("VerifyBackup of a new backup: %v", err)
	}
	if fmt.Sprint(read.Taken.UnixNano(), read.Last, read.Size, read.Members, read.ClusterUUID, read.Term) != fmt.Sprint(info.Taken.UnixNano(), info.Last, info.Size, info.Members, info.ClusterUUID, info.Term) {
		t.Fatalf("the backup says %+v, Backup returned %+v", read, info)
	}
	return b.Bytes(), info
}

// restoredHarness starts a cluster of one node from a backup.
func restoredHarness(t *testing.T, backup []byte, opts ...HarnessOption) (*Harness, HistoryRecord) {
	t.Helper()
	dir := t.TempDir()
	record, err := RestoreBackup(t.Context(), filepath.Join(dir, "0"), bytes.NewReader(backup),
		RestoreOptions{ID: "0", Addr: harnessAddr(0), ClusterID: "harness"})
	if err != nil {
		t.Fatal(err)
	}
	return NewHarness(t, 1, append([]HarnessOption{WithDisk(dir)}, opts...)...), record
}

// A backup that is taken from any node while clients write has every write that
// was answered before; restored, it is the state of a new cluster, which grows
// by new nodes and goes on.
func TestBackupUnderLoad(t *testing.T) {
	machines := WithStateMachine(func() StateMachine { return &journal{filler: 600_000} })
	snapshots(t, 3, func(t *testing.T, h *Harness) {
		proposeN(t, h, "a", 10)
		leader, _ := h.CheckSingleLeader()
		ctx, stop := context.WithCancel(t.Context())
		load := make(chan int)
		go func() {
			n := 0
			for ; ctx.Err() == nil; n++ {
				if _, err := h.Server(leader).Propose(ctx, fmt.Appendf(nil, "load%d", n)); err != nil {
					break
				}
				time.Sleep(time.Millisecond)
			}
			load <- n
		}()
		time.Sleep(100 * time.Millisecond)
		for i := range 3 {
			r, err := h.Server(leader).Propose(ctx, fmt.Appendf(nil, "mark%d", i))
			if err != nil {
				t.Fatal(err)
			}
			b, info := backupOf(t, h.Server(i))
			if info.Last.Index < r.Index || info.ClusterID != "harness" || string(info.Node) != strconv.Itoa(i) || len(info.Members) != 3 || info.Size < 600_000 {
				t.Fatalf("entry %d was answered, then backed up: %+v", r.Index, info)
			}
			checkRestored(t, b, info, h.Server(i).Status(), fmt.Sprintf("mark%d", i), machines)
		}
		stop()
		if n := <-load; n < 50 {
			t.Fatalf("%d writes were answered meanwhile", n)
		}
		h.CheckLogsMatch()
	}, machines)
}

// checkRestored starts a cluster from a backup and compares it with the machine
// of the node that wrote it, which has gone on since.
func checkRestored(t *testing.T, b []byte, info BackupInfo, from Status, mark string, machines HarnessOption) {
	t.Helper()
	h, record := restoredHarness(t, b, machines)
	defer h.Shutdown()
	h.CheckSingleLeader()
	got := readJournal(h, 0)
	if !strings.Contains(got+" ", mark+" ") {
		t.Fatalf("%s was answered before the backup and is not in %q", mark, got)
	}
	st := h.Server(0).Status()
	if record.Kept != info.Last || st.First <= info.Last.Index+indexStep || st.Term <= info.Term+termStep || st.ClusterUUID != record.To || record.From != from.ClusterUUID || record.To == record.From {
		t.Fatalf("the backup is %+v, the record %+v, the status %+v", info, record, st)
	}
	if len(st.History) != 1 || st.History[0].String() != record.String() || len(st.Members) != 1 {
		t.Fatalf("the status has the members %v and the history %v, want %v", st.Members, st.History, record)
	}
	proposeN(t, h, "new", 3)
	h.Add()
	h.Add()
	proposeN(t, h, "newer", 2)
	for i := range 3 {
		caughtUp(t, h, i)
		if all := readJournal(h, i); !strings.HasPrefix(all, got+" new0 new1 new2") {
			t.Fatalf("node %d has %q after %q", i, all, got)
		}
	}
	h.CrashPeer(0) // what the new cluster has is durable, and its history too
	proposeN(t, h, "without", 2)
	h.RestartPeer(0)
	caughtUp(t, h, 0)
	if st := h.Server(0).Status(); len(st.History) != 1 || st.ClusterUUID != record.To {
		t.Fatalf("after a restart the status is %+v", st)
	}
}

// Nodes of the old cluster and one of the new one, at an address that they
// know, refuse each other; both clusters go on by themselves.
func TestRestoredClusterIsApart(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		h := NewHarness(t, 3, WithDisk(dir), WithStateMachine(func() StateMachine { return &journal{} }))
		defer h.Shutdown()
		proposeN(t, h, "a", 5)
		b, _ := backupOf(t, h.Server(0))
		h.CrashPeer(0)
		proposeN(t, h, "old", 2)
		if err := os.Rename(filepath.Join(dir, "0"), filepath.Join(dir, "was0")); err != nil {
			t.Fatal(err)
		}
		_, err := RestoreBackup(t.Context(), filepath.Join(dir, "0"), bytes.NewReader(b), RestoreOptions{ID: "0", Addr: harnessAddr(0), ClusterID: "harness"})
		if err != nil {
			t.Fatal(err)
		}
		h.RestartPeer(0)
		old := h.Server(1)
		for _, s := range []*Server{old, h.Server(0)} {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			if _, err := s.Propose(ctx, []byte(s.conf.ID+" goes on")); err != nil {
				t.Fatalf("%s: %v", s.conf.ID, err)
			}
			cancel()
		}
		time.Sleep(5 * time.Second)
		if n := len(h.Server(0).Status().Members); n != 1 {
			t.Fatalf("the new cluster has %d members", n)
		}
		for i := range 3 {
			if got := readJournal(h, i); strings.Contains(got, "0 goes on") != (i == 0) || strings.Contains(got, "1 goes on") != (i != 0) {
				t.Errorf("node %d has %q", i, got)
			}
		}
		refusedByCluster(t, h.Server(0))
		refusedByCluster(t, old, h.Server(2))
	})
}

// refusedByCluster checks that one of the nodes has reported a peer of another cluster.
func refusedByCluster(t *testing.T, servers ...*Server) {
	t.Helper()
	for _, s := range servers {
		for _, e := range eventsOf(s) {
			if no := (*HandshakeError)(nil); errors.As(e.Err, &no) && no.Reason == HandshakeOtherCluster {
				return
			}
		}
	}
	t.Errorf("%s has refused nobody as of another cluster", servers[0].conf.ID)
}

// eventsOf returns what a node has reported so far.
func eventsOf(s *Server) (list []Event) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	last := fmt.Sprint("the last one: ", rand.Uint64()) // an earlier call has left its own
	s.emit(Event{Kind: EventStarted, Detail: last})
	for e := range s.Events(ctx) {
		if e.Detail == last {
			break
		}
		list = append(list, e)
	}
	return list
}

// Without a leader Backup says so, and BackupLocal writes what the node has.
func TestBackupWithoutQuorum(t *testing.T) {
	snapshots(t, 3, func(t *testing.T, h *Harness) {
		proposeN(t, h, "a", 5)
		for i := range 3 {
			caughtUp(t, h, i)
		}
		h.CrashPeer(0)
		h.CrashPeer(1)
		time.Sleep(5 * time.Second)
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		var b bytes.Buffer
		if _, err := h.Server(2).Backup(ctx, &b); !errors.Is(err, ErrNoLeader) || !errors.Is(err, context.DeadlineExceeded) || b.Len() > 0 {
			t.Fatalf("without a leader: %v, %d bytes", err, b.Len())
		}
		if _, err := h.Server(2).BackupLocal(t.Context(), &b); err != nil {
			t.Fatal(err)
		}
		g, _ := restoredHarness(t, b.Bytes(), WithStateMachine(func() StateMachine { return &journal{} }))
		defer g.Shutdown()
		g.CheckSingleLeader()
		if got := readJournal(g, 0); got != readJournal(h, 2) || got != "a0 a1 a2 a3 a4" {
			t.Fatalf("restored %q", got)
		}
	})
}

// BackupLocal of a node that can't take a snapshot has its newest one; of one
// that has none, an error that says why.
func TestBackupLocalFallsBack(t *testing.T) {
	fault, broken := &atomic.Pointer[string]{}, "Snapshot error"
	fault.Store(&broken)
	snapshots(t, 1, func(t *testing.T, h *Harness) {
		proposeN(t, h, "a", 3)
		var b bytes.Buffer
		_, err := h.Server(0).BackupLocal(t.Context(), &b)
		if failed := (*SnapshotError)(nil); !errors.As(err, &failed) || b.Len() > 0 {
			t.Fatalf("without any snapshot: %v, %d bytes", err, b.Len())
		}
		fault.Store(nil)
		h.TakeSnapshot(0)
		last := h.Server(0).Status().Snapshot
		proposeN(t, h, "b", 3)
		fault.Store(&broken)
		info, err := h.Server(0).BackupLocal(t.Context(), &b)
		if err != nil || info.Last.Index != last {
			t.Fatalf("backed up to %v, %v; the snapshot is of %d", info.Last, err, last)
		}
		if _, err := VerifyBackup(&b); err != nil {
			t.Fatal(err)
		}
		if _, err := h.Server(0).Backup(t.Context(), io.Discard); err == nil {
			t.Fatal("Backup gives an old state for a new one")
		}
	}, WithStateMachine(func() StateMachine { return &journal{fault: fault} }))
}

// gate is a writer whose writes wait until it is opened, and then fail with err.
type gate struct {
	entered, open chan struct{}
	err           error
}

func newGate(err error) *gate { return &gate{make(chan struct{}, 1000), make(chan struct{}), err} }

func (g *gate) Write(p []byte) (int, error) {
	g.entered <- struct{}{}
	<-g.open
	return len(p), g.err
}

// A backup whose reader has stalled holds up neither writes nor snapshots. Close
// names it, and ends it with the next block. An error of the writer, and the
// context's, end it at once; nothing stays open.
func TestBackupStalls(t *testing.T) {
	snapshots(t, 1, func(t *testing.T, h *Harness) {
		proposeN(t, h, "a", 3)
		s := h.Server(0)
		full := newGate(errors.New("no space"))
		close(full.open)
		if _, err := s.Backup(t.Context(), full); !errors.Is(err, full.err) {
			t.Fatalf("a writer that fails: %v", err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		gates := [2]*gate{newGate(nil), newGate(nil)}
		answers := make(chan error, 2)
		for i, c := range []context.Context{ctx, t.Context()} {
			go func() {
				_, err := s.Backup(c, gates[i])
				answers <- err
			}()
			<-gates[i].entered
		}
		for range 3 { // more than a storage keeps
			proposeN(t, h, "b", 3)
			h.TakeSnapshot(0)
		}
		cancel()
		close(gates[0].open)
		if err := <-answers; !errors.Is(err, context.Canceled) {
			t.Fatalf("after its context has ended: %v", err)
		}
		err := s.Close()
		if running := (*StillRunningError)(nil); !errors.As(err, &running) || !running.Snapshot || !strings.Contains(err.Error(), "Backup") {
			t.Fatalf("Close beside a stalled backup: %v", err)
		}
		close(gates[1].open)
		if err := <-answers; !errors.Is(err, ErrStopped) {
			t.Fatalf("a backup of a closed node: %v", err)
		}
		<-s.Done()
		for _, backup := range []func(context.Context, io.Writer) (BackupInfo, error){s.Backup, s.BackupLocal} {
			if _, err := backup(t.Context(), io.Discard); !errors.Is(err, ErrStopped) {
				t.Fatalf("of a closed node: %v", err)
			}
		}
		h.CrashPeer(0) // it was meant
	}, WithStateMachine(func() StateMachine { return &journal{filler: 3 << 20} }))
}

// A stored snapshot that has rotted gives no backup, and another one is taken.
func TestBackupOfDamagedSnapshot(t *testing.T) {
	snapshots(t, 1, func(t *testing.T, h *Harness) {
		proposeN(t, h, "a", 3)
		h.TakeSnapshot(0)
		mem := h.nodes[0].disk.mem
		names, err := snap.List(mem, "data/snap")
		if err != nil || len(names) != 1 {
			t.Fatal(names, err)
		}
		if err := mem.FlipBit("data/snap/"+names[0]+".snap", 600_000, 1); err != nil {
			t.Fatal(err)
		}
		var b bytes.Buffer
		_, err = h.Server(0).Backup(t.Context(), &b)
		if corrupt := (*CorruptError)(nil); !errors.As(err, &corrupt) {
			t.Fatalf("of a damaged snapshot: %v", err)
		}
		if _, err := VerifyBackup(&b); err == nil {
			t.Fatal("what was written before the damage passes for a backup")
		}
		backupOf(t, h.Server(0))
	}, WithStateMachine(func() StateMachine { return &journal{filler: 1 << 20} }))
}

// busyStorage does something before its first OpenSnapshot.
type busyStorage struct {
	*MemoryStorage
	before func()
}

func (b *busyStorage) OpenSnapshot(last EntryID) (SnapshotMeta, SnapshotReader, error) {
	if f := b.before; f != nil {
		b.before = nil
		f()
	}
	return b.MemoryStorage.OpenSnapshot(last)
}

// Snapshots that are taken meanwhile may replace the one that was to be read:
// then a newer one is.
func TestBackupBesideSnapshots(t *testing.T) {
	storage := &busyStorage{MemoryStorage: NewMemoryStorage()}
	snapshots(t, 1, func(t *testing.T, h *Harness) {
		proposeN(t, h, "a", 3)
		first := h.Server(0).Status().Applied
		storage.before = func() {
			for i := range keptSnapshots {
				proposeN(t, h, fmt.Sprintf("b%d", i), 1)
				h.TakeSnapshot(0)
			}
		}
		if _, info := backupOf(t, h.Server(0)); info.Last.Index <= first {
			t.Fatalf("backed up to %v, and two snapshots came after %d", info.Last, first)
		}
	}, WithConfig(func(_ int, c *Config) { c.Storage = storage }))
}

// A node that has no cluster yet has nothing to back up, and says so.
func TestBackupOfNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := NewHarness(t, 1)
		defer h.Shutdown()
		i := h.startNew()
		if _, err := h.Server(i).BackupLocal(t.Context(), io.Discard); !errors.Is(err, errNothingToBackUp) {
			t.Fatal(err)
		}
	})
}

// A state machine on disk is backed up and restored like any other; one that
// still holds the old cluster's state is replaced.
func TestBackupOnDisk(t *testing.T) {
	for _, used := range []bool{false, true} {
		onTables(t, 3, func(t *testing.T, h *Harness, tables []*table) {
			proposeN(t, h, "a", 5)
			b, _ := backupOf(t, h.Server(1))
			fresh := &table{}
			if used {
				proposeN(t, h, "later", 2)
				h.CrashPeer(1)
				fresh = tables[1]
			}
			grown := []*table{fresh, {}}
			g, record := restoredHarness(t, b, WithStateMachineOf(func(i int) StateMachine { return tableMachine{grown[i]} }))
			defer g.Shutdown()
			g.CheckSingleLeader()
			if got := tableLines(g, 0); got != "a0 a1 a2 a3 a4" || fresh.restores != 1 {
				t.Fatalf("restored %q, %d times", got, fresh.restores)
			}
			if meta, _, err := loadMeta(tableMachine{fresh}); err != nil || meta.Last != record.Next {
				t.Fatalf("the database says %+v, %v", meta, err)
			}
			g.Add()
			proposeN(t, g, "b", 1)
			g.CrashPeer(0)
			g.RestartPeer(0)
			proposeN(t, g, "c", 1)
			if got := tableLines(g, 0); got != "a0 a1 a2 a3 a4 b0 c0" || fresh.restores != 1 {
				t.Fatalf("after a restart it has %q, %d restores", got, fresh.restores)
			}
		})
	}
}

// A client's session is in the backup: a request answered before it is answered
// alike by the new cluster and not executed again, and the session goes on.
func TestBackupKeepsSessions(t *testing.T) {
	snapshots(t, 1, func(t *testing.T, h *Harness) {
		proposeN(t, h, "a", 2)
		id, err := h.Server(0).OpenSession(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		first, err := h.Server(0).ProposeOnce(t.Context(), RequestID{Session: id, Seq: 1}, []byte("once"))
		if err != nil {
			t.Fatal(err)
		}
		b, _ := backupOf(t, h.Server(0))
		if _, err := h.Server(0).ProposeOnce(t.Context(), RequestID{Session: id, Seq: 2}, []byte("after")); err != nil {
			t.Fatal(err)
		}
		g, record := restoredHarness(t, b, WithStateMachine(func() StateMachine { return &journal{} }))
		defer g.Shutdown()
		g.CheckSingleLeader()
		again, err := g.Server(0).ProposeOnce(t.Context(), RequestID{Session: id, Seq: 1}, []byte("once"))
		if err != nil || again.Index != first.Index || string(again.Data) != string(first.Data) {
			t.Fatalf("it was answered %+v, and now %+v, %v", first, again, err)
		}
		if _, err := g.Server(0).ProposeOnce(t.Context(), RequestID{Session: id, Seq: 2}, []byte("after")); err != nil {
			t.Fatal(err)
		}
		if got := readJournal(g, 0); got != "a0 a1 once after" {
			t.Fatalf("the new cluster has %q", got)
		}
		if other, err := g.Server(0).OpenSession(t.Context()); err != nil || Index(other) <= record.Next.Index {
			t.Fatalf("session %d after a restore to %v: it may be one of the old cluster (%v)", other, record.Next, err)
		}
	})
}

// Every backup that was cut short or damaged is refused, by VerifyBackup and by
// RestoreBackup, with an error that says what it is; the directory is then as it
// was, and takes the whole one.
func TestRestoreDamaged(t *testing.T) {
	whole := someBackup(t, strings.Repeat("state", 40))
	long := someBackup(t, strings.Repeat("x", 2*256<<10+100)) // three blocks
	const block = 4 + 256<<10
	head := len(long) - 3*4 - (2*256<<10 + 100) - 32
	mem := vfs.NewMem(rand.New(rand.NewPCG(1, 1)))
	try := func(what string, b []byte) {
		t.Helper()
		_, verifyErr := VerifyBackup(bytes.NewReader(b))
		_, restoreErr := memoryDir(mem).restoreBackup(t.Context(), bytes.NewReader(b), restoreOptions(), time.Now())
		for name, err := range map[string]error{"VerifyBackup": verifyErr, "RestoreBackup": restoreErr} {
			var corrupt *CorruptError
			var refused *RestoreError
			if !errors.As(err, &corrupt) && !errors.As(err, &refused) {
				t.Errorf("%s: %s: %v", what, name, err)
			}
		}
	}
	for n := range whole {
		try(fmt.Sprintf("cut off at %d", n), whole[:n])
		b := bytes.Clone(whole)
		b[n] ^= 1 << (n % 8)
		try(fmt.Sprintf("bit %d of byte %d", n%8, n), b)
	}
	for _, at := range []int{head, head + block, head + 2*block, len(long) - 32} {
		for d := -1; d <= 1; d++ {
			try(fmt.Sprintf("cut off at %d of %d", at+d, len(long)), long[:at+d])
		}
	}
	try("more behind it", append(bytes.Clone(whole), 0))
	try("twice", append(bytes.Clone(whole), whole...))
	if mem.OpenFiles() != 0 {
		t.Fatalf("%d files are open", mem.OpenFiles())
	}
	if _, err := memoryDir(mem).restoreBackup(t.Context(), bytes.NewReader(long), restoreOptions(), time.Now()); err != nil {
		t.Fatalf("the whole one, after all that: %v", err)
	}
	checkRestoredDir(t, mem, strings.Repeat("x", 2*256<<10+100))
}

// checkRestoredDir opens what restoreBackup made of someBackup.
func checkRestoredDir(t *testing.T, fs vfs.FS, state string) {
	t.Helper()
	d := memoryDir(fs)
	rec, err := d.Open(context.Background(), Identity{"new", "n"})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	next := EntryID{Index(raised(7, indexStep)), Term(raised(9, termStep))}
	conf, err := decodeConfiguration(rec.Config)
	if err != nil || rec.Start != next || rec.Last != next.Index || rec.HardState != (HardState{Term: next.Term}) || len(rec.Snapshots) != 1 || len(rec.older) != 0 {
		t.Fatalf("recovered %+v (%v)", rec, err)
	}
	meta := rec.Snapshots[0]
	if len(conf.members) != 1 || conf.members[0].name != "n" || conf.members[0].addr != "host:1" || conf.members[0].dirID != rec.DirectoryID || rec.ownNumber("n", rec.DirectoryID) == 0 || !meta.Time.Equal(time.Unix(7, 0)) {
		t.Fatalf("configuration %+v, snapshot %+v", conf, meta)
	}
	checkSnapshot(t, d, meta, state)
	if len(rec.History) != 1 || rec.History[0].What != HistoryRestore || rec.History[0].Kept != (EntryID{7, 3}) {
		t.Fatalf("history %+v", rec.History)
	}
}

// Whatever is not a backup of the right cluster, and every directory that is
// not empty, is refused by type, with what to do; and is as it was.
func TestRestoreRefuses(t *testing.T) {
	whole := someBackup(t, "state")
	header := backupHeader{cluster: "old", node: "a", term: 3, meta: snapshotUpTo(7, 3, 2)}
	stream := func(header []byte) []byte { return streamOf(t, header, "") }
	newer := header.encode()
	newer[len(backupMagic)] = 2
	with := func(f func(o *RestoreOptions)) RestoreOptions {
		o := *restoreOptions()
		f(&o)
		return o
	}
	for _, c := range []struct {
		what   string
		backup []byte
		o      RestoreOptions
		put    string // a file in the directory
		reason RestoreReason
		text   string
	}{
		{"nothing", nil, *restoreOptions(), "", RestoreNotBackup, "begins with \"\""},
		{"text", []byte("PK\x03\x04 and so on, for a while, longer than a head"), *restoreOptions(), "", RestoreNotBackup, "what Backup has written"},
		{"a snapshot file", stream(header.meta.encode(nil)), *restoreOptions(), "", RestoreNotBackup, "a snapshot file"},
		{"a newer backup", stream(newer), *restoreOptions(), "", RestoreNewer, "version 2"},
		{"another cluster's", whole, with(func(o *RestoreOptions) { o.FromCluster = "" }), "", RestoreOtherCluster, `FromCluster to "old"`},
		{"another cluster's than said", whole, with(func(o *RestoreOptions) { o.FromCluster = "odd" }), "", RestoreOtherCluster, `one of "odd"`},
		{"a file is there", whole, *restoreOptions(), "notes.txt", RestoreNotEmpty, "notes.txt"},
		{"a node is there", whole, *restoreOptions(), "identity", RestoreNotEmpty, "identity"},
		{"half a snapshot is there", whole, *restoreOptions(), "snap/x.snap.tmp", RestoreNotEmpty, "snap/x.snap.tmp"},
		{"no ID", whole, with(func(o *RestoreOptions) { o.ID = "" }), "", RestoreBadOptions, "ID"},
		{"no cluster", whole, with(func(o *RestoreOptions) { o.ClusterID = "" }), "", RestoreBadOptions, "ClusterID"},
		{"no port", whole, with(func(o *RestoreOptions) { o.Addr = "host" }), "", RestoreBadOptions, "Addr"},
		{"any port", whole, with(func(o *RestoreOptions) { o.Addr = "host:0" }), "", RestoreBadOptions, "Addr"},
	} {
		dir := filepath.Join(t.TempDir(), "node")
		if c.put != "" {
			if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, c.put)), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, c.put), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		before := listTree(t, dir)
		_, err := RestoreBackup(t.Context(), dir, bytes.NewReader(c.backup), c.o)
		var refused *RestoreError
		if !errors.As(err, &refused) || refused.Reason != c.reason || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v", c.what, err)
		}
		if after := listTree(t, dir); after != before {
			t.Errorf("%s: the directory was %q and is %q", c.what, before, after)
		}
	}
	var corrupt *CorruptError
	if _, err := VerifyBackup(bytes.NewReader(stream([]byte(backupMagic + "\x01xx")))); !errors.As(err, &corrupt) {
		t.Errorf("a header that is too short: %v", err)
	}
	header.term = 2
	if _, err := VerifyBackup(bytes.NewReader(stream(header.encode()))); !errors.As(err, &corrupt) {
		t.Errorf("a term below the last entry's: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := RestoreBackup(ctx, filepath.Join(t.TempDir(), "node"), bytes.NewReader(whole), *restoreOptions()); !errors.Is(err, context.Canceled) {
		t.Errorf("a context that has ended: %v", err)
	}
}

// listTree names every file below a directory.
func listTree(t *testing.T, dir string) string {
	t.Helper()
	var names []string
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		names = append(names, path)
		return err
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return strings.Join(names, " ")
}

// The error of a file gives its name.
func TestRestoreNamesFile(t *testing.T) {
	name := filepath.Join(t.TempDir(), "monday.backup")
	if err := os.WriteFile(name, someBackup(t, "state")[:100], 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := VerifyBackup(f); err == nil || !strings.Contains(err.Error(), name) {
		t.Errorf("%v", err)
	}
}

// Power is cut before every operation of a restore that changes the disk. What
// is left is the whole cluster, or no data directory: then a node refuses it, or
// finds it empty, and so does the next restore.
func TestRestoreCrashPoints(t *testing.T) {
	backup := someBackup(t, "state")
	for seed := range uint64(4) {
		mem := vfs.NewMem(rand.New(rand.NewPCG(seed, 1)))
		rng := rand.New(rand.NewPCG(seed, 2))
		points, outcomes := 0, map[string]int{}
		check := func(c *vfs.Mem, killed bool) {
			outcome := afterRestore(t, c, backup)
			outcomes[outcome]++
			if t.Failed() {
				t.Fatalf("seed %d, crash before operation %d (a kill: %v): %s", seed, points, killed, outcome)
			}
		}
		mem.SetHook(func(op vfs.Op) error {
			if !op.Kind.Changes() {
				return nil
			}
			points++
			cold := mem.Clone()
			cold.Kill()
			check(cold, true)
			for _, choose := range []func(int) int{func(int) int { return 0 }, func(n int) int { return min(1, n-1) }, rng.IntN, rng.IntN} {
				check(mem.CrashClone(choose), false)
			}
			return nil
		})
		_, err := memoryDir(mem).restoreBackup(t.Context(), bytes.NewReader(backup), restoreOptions(), time.Now())
		mem.SetHook(nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range []*vfs.Mem{mem, mem.CrashClone(func(int) int { return 0 })} {
			if got := afterRestore(t, c, backup); got != "whole" {
				t.Fatalf("after RestoreBackup has returned, it is %s", got)
			}
		}
		t.Logf("seed %d: %d points: %v", seed, points, outcomes)
		if outcomes["refused"] == 0 || outcomes["empty"] == 0 || points < 20 {
			t.Errorf("seed %d: %d points: %v", seed, points, outcomes)
		}
	}
}

// afterRestore says what a crash has left of a restore.
func afterRestore(t *testing.T, mem *vfs.Mem, backup []byte) string {
	t.Helper()
	again := mem.Clone()
	_, againErr := memoryDir(again).restoreBackup(t.Context(), bytes.NewReader(backup), restoreOptions(), time.Now())
	d := memoryDir(mem)
	rec, err := d.Open(t.Context(), Identity{"new", "n"})
	var corrupt *CorruptError
	if errors.As(err, &corrupt) {
		if refused := (*RestoreError)(nil); !errors.As(againErr, &refused) || refused.Reason != RestoreNotEmpty {
			t.Errorf("a node refuses the directory (%v), and RestoreBackup says %v", err, againErr)
		}
		return "refused"
	}
	if err != nil {
		t.Errorf("neither refused nor opened: %v", err)
		return ""
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if rec.Config == nil && rec.Last == 0 && len(rec.Snapshots) == 0 {
		if againErr != nil {
			t.Errorf("nothing is there, and RestoreBackup says %v", againErr)
		} else {
			checkRestoredDir(t, again, "state")
		}
		return "empty"
	}
	checkRestoredDir(t, mem, "state")
	return "whole"
}

// Every operation of a restore fails once: the error says so, no file stays
// open, and what is left is as after a crash.
func TestRestoreDiskFailures(t *testing.T) {
	backup := someBackup(t, "state")
	for _, broken := range []error{errors.New("input/output error"), syscall.ENOSPC} {
		for fail := 1; ; fail++ {
			mem := vfs.NewMem(rand.New(rand.NewPCG(1, 1)))
			failed := failOnce(mem, fail, broken)
			_, err := memoryDir(mem).restoreBackup(t.Context(), bytes.NewReader(backup), restoreOptions(), time.Now())
			mem.SetHook(nil)
			if failed.Size < 0 {
				if fail < 40 {
					t.Errorf("only %d operations", fail)
				}
				break
			}
			if err != nil && !errors.Is(err, broken) || mem.OpenFiles() != 0 {
				t.Fatalf("operation %d, %+v, failed: %v; %d files are open", fail, failed, err, mem.OpenFiles())
			}
			if got := afterRestore(t, mem, backup); err == nil && got != "whole" || t.Failed() {
				t.Fatalf("operation %d, %+v, failed: %v, and it is %s", fail, failed, err, got)
			}
		}
	}
}

// FuzzBackup reads what claims to be a backup. raw is read as it is; header and
// state as the parts of a stream whose checksums are right, as of one that was
// forged. VerifyBackup must not panic, must give a typed error, and what it takes
// must be what Backup writes; RestoreBackup must agree with it, and make a
// directory that opens.
func FuzzBackup(f *testing.F) {
	whole := someBackup(f, "state")
	h := backupHeader{taken: time.Unix(900, 5).UTC(), term: 9, cluster: "old", node: "a", meta: snapshotUpTo(7, 3, 2)}
	f.Add(whole, h.encode(), []byte("state"))
	f.Add(whole[:len(whole)-1], h.encode()[:60], []byte{})
	f.Add([]byte("PK"), append([]byte(backupMagic), 2), []byte("x"))
	f.Add([]byte{}, h.meta.encode(nil), []byte("x"))
	f.Fuzz(func(t *testing.T, raw, header, state []byte) {
		if len(header) > 1<<14 || len(state) > 1<<14 || len(raw) > 1<<16 {
			return
		}
		var b bytes.Buffer
		e, err := snap.NewEncoder(&b, header, 1)
		if err == nil {
			e.Write(state)
			err = e.Finish()
		}
		if err != nil {
			t.Fatal(err)
		}
		for _, b := range [][]byte{raw, b.Bytes()} {
			fuzzBackup(t, b)
		}
	})
}

func fuzzBackup(t *testing.T, b []byte) {
	info, err := VerifyBackup(bytes.NewReader(b))
	mem := vfs.NewMem(rand.New(rand.NewPCG(1, 1)))
	o := &RestoreOptions{ID: "n", Addr: "host:1", ClusterID: "new", FromCluster: info.ClusterID}
	record, restoreErr := memoryDir(mem).restoreBackup(t.Context(), bytes.NewReader(b), o, time.Now())
	var corrupt *CorruptError
	var refused *RestoreError
	if err != nil {
		if !errors.As(err, &corrupt) && !errors.As(err, &refused) {
			t.Fatalf("an untyped error: %v", err)
		}
		if restoreErr == nil {
			t.Fatalf("RestoreBackup takes what VerifyBackup refuses: %v", err)
		}
		return
	}
	if restoreErr != nil && info.ClusterID != "" { // no cluster's ID is empty, and an empty FromCluster says nothing
		t.Fatalf("RestoreBackup refuses what VerifyBackup takes: %v", restoreErr)
	}
	if restoreErr != nil {
		return
	}
	d := memoryDir(mem)
	rec, err := d.Open(t.Context(), Identity{"new", "n"})
	if err != nil || rec.Start != record.Next || rec.Start.Index <= info.Last.Index || rec.Start.Term <= info.Term {
		t.Fatalf("restored %+v of %+v: %v", rec, info, err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}

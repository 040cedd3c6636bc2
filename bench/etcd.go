package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log"
	"math"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/fileutil"
	"go.etcd.io/etcd/server/v3/etcdserver/api/snap"
	"go.etcd.io/etcd/server/v3/storage/wal"
	"go.etcd.io/etcd/server/v3/storage/wal/walpb"
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"
	"google.golang.org/protobuf/proto"
)

// go.etcd.io/raft is a state machine without disk, network or goroutines. This
// driver gives it etcd's write-ahead log and, between the nodes, one TCP
// connection per pair. Each node has one goroutine that does everything in turn
// for all that has come in meanwhile: step, send, apply, write, sync. The leader
// sends before it syncs, as etcd does.

// How it is tuned.
const (
	etcdTick      = 100 * time.Millisecond // etcd's default heartbeat; an election takes 10 of them
	etcdMessage   = 1 << 20                // bytes of entries per message, as in etcd
	etcdInflight  = 512                    // messages under way to a follower, as in etcd
	etcdPack      = 1 << 20                // bytes of commands in one entry, where they are packed
	etcdEntryCost = 64                     // bytes an entry is taken to have besides its command
	etcdKeep      = 8 << 20                // bytes of entries after which those before the last such moment leave the memory
	etcdSnapshot  = 64 << 20               // bytes of entries after which a snapshot goes to disk and older segments are removed
)

var errEtcdStopped = errors.New("etcd raft is stopped")

type etcdSystem struct {
	// Tests make them smaller.
	inflight       int
	keep, snapshot int

	packed bool // all commands of a batch in one entry
	nodes  []*etcdNode
	conns  []net.Conn
	purges []<-chan struct{} // closed when a purging goroutine has ended
	wg     sync.WaitGroup

	leader  atomic.Pointer[etcdNode]
	elected chan struct{} // closed when leader is set

	once    sync.Once
	stopped chan struct{} // closed with failure set
	failure error
}

func newEtcd(packed bool) *etcdSystem {
	return &etcdSystem{
		inflight: etcdInflight, keep: etcdKeep, snapshot: etcdSnapshot, packed: packed,
		elected: make(chan struct{}), stopped: make(chan struct{}),
	}
}

// etcdBatch is the commands that clients proposed while the leader was busy.
// They are entries of their own, or records of larger entries.
type etcdBatch struct {
	buf  []byte
	ends []int // of each entry in buf
	left int   // entries not applied yet; the leader's goroutine counts
	next int   // where the next of them starts in buf
	done chan struct{}
	err  error // read after done
}

// etcdNode is one node. Its goroutine alone uses what no lock guards.
type etcdNode struct {
	sys     *etcdSystem
	id      uint64
	raw     *raft.RawNode
	storage *raft.MemoryStorage
	wal     *wal.WAL
	snaps   *snap.Snapshotter
	peers   []*etcdPeer
	counts

	leads   bool
	woken   bool // clients were woken that may not have run yet
	applied uint64
	flights []*etcdBatch // proposed and not yet applied, in order

	unkept, unsaved int         // bytes of entries since the last compaction in memory and the last snapshot on disk
	compactTo       uint64      // index of the next compaction in memory: what was applied at the last one
	saving          atomic.Bool // a snapshot is being written

	mu    sync.Mutex // guards what the node's goroutine is handed
	inbox []*raftpb.Message
	batch *etcdBatch // nil: nothing was proposed
	size  int        // of the last batch's buffer
	err   error      // not nil: the goroutine has ended
	wake  chan struct{}
	spare []*raftpb.Message // the inbox of the round before, used again
}

// etcdPeer is the way to another node.
type etcdPeer struct {
	id   uint64
	conn net.Conn
	buf  []byte // messages of one round, each after its length in 4 bytes
}

func (s *etcdSystem) Start(dir string) error {
	members := &raftpb.ConfState{Voters: []uint64{1, 2, 3}}
	for _, id := range members.Voters {
		n := &etcdNode{sys: s, id: id, wake: make(chan struct{}, 1)}
		if err := n.open(filepath.Join(dir, fmt.Sprintf("n%d", id)), members); err != nil {
			return errors.Join(fmt.Errorf("node %d: %w", id, err), s.Stop())
		}
		s.nodes = append(s.nodes, n)
	}
	for i, a := range s.nodes {
		for _, b := range s.nodes[i+1:] {
			ours, theirs, err := tcpPair()
			if err != nil {
				return errors.Join(err, s.Stop())
			}
			s.conns = append(s.conns, ours, theirs)
			a.peers = append(a.peers, &etcdPeer{id: b.id, conn: ours})
			b.peers = append(b.peers, &etcdPeer{id: a.id, conn: theirs})
		}
	}
	err := s.nodes[0].raw.Campaign()
	for _, n := range s.nodes {
		s.wg.Go(n.run)
		for _, p := range n.peers {
			s.wg.Go(func() { n.receive(p.conn) })
		}
	}
	if err == nil {
		select {
		case <-s.elected:
			return nil
		case <-s.stopped:
			err = s.failure
		case <-time.After(formation):
			err = fmt.Errorf("no leader within %v", formation)
		}
	}
	return errors.Join(err, s.Stop())
}

// open gives the node a log that starts behind a snapshot at index 1 which names
// the members: what raft's documentation recommends for a new cluster.
func (n *etcdNode) open(home string, members *raftpb.ConfState) error {
	walDir, snapDir := filepath.Join(home, "wal"), filepath.Join(home, "snap")
	if err := os.MkdirAll(snapDir, 0o755); err != nil {
		return err
	}
	quiet := zap.NewNop()
	n.snaps = snap.New(quiet, snapDir)
	n.storage = raft.NewMemoryStorage()
	var err error
	if n.wal, err = wal.Create(quiet, walDir, nil); err != nil {
		return err
	}
	first := &raftpb.Snapshot{
		Data:     n.encode(),
		Metadata: &raftpb.SnapshotMetadata{Index: new(uint64(1)), Term: new(uint64(1)), ConfState: members},
	}
	state := &raftpb.HardState{Term: new(uint64(1)), Vote: new(uint64(0)), Commit: new(uint64(1))}
	if err = errors.Join(
		n.save(first), n.wal.Save(state, nil), n.storage.ApplySnapshot(first), n.storage.SetHardState(state),
	); err != nil {
		return errors.Join(err, n.wal.Close())
	}
	n.applied, n.compactTo = 1, 1
	n.raw, err = raft.NewRawNode(&raft.Config{
		ID:                        n.id,
		ElectionTick:              10,
		HeartbeatTick:             1,
		Storage:                   n.storage,
		MaxSizePerMsg:             etcdMessage,
		MaxInflightMsgs:           n.sys.inflight,
		MaxCommittedSizePerReady:  math.MaxUint64,
		CheckQuorum:               true,
		PreVote:                   true,
		DisableProposalForwarding: true, // a batch has to come back where its clients wait
		Logger:                    &raft.DefaultLogger{Logger: log.New(io.Discard, "", 0)},
	})
	if err != nil {
		return errors.Join(err, n.wal.Close())
	}
	for _, d := range []struct{ dir, suffix string }{{walDir, "wal"}, {snapDir, "snap"}} {
		// Files that the log still needs are locked and stay.
		ended, _ := fileutil.PurgeFileWithDoneNotify(quiet, d.dir, d.suffix, 1, time.Second, n.sys.stopped)
		n.sys.purges = append(n.sys.purges, ended)
	}
	return nil
}

// Propose adds a copy of the payload to the batch that the leader takes next.
func (s *etcdSystem) Propose(ctx context.Context, payload []byte) error {
	if len(payload) == 0 {
		return errors.New("a command needs a byte: raft's own entries have none")
	}
	n := s.leader.Load()
	n.mu.Lock()
	if n.err != nil {
		n.mu.Unlock()
		return n.err
	}
	b := n.batch
	if b == nil {
		b = &etcdBatch{buf: make([]byte, 0, n.size+n.size/4), done: make(chan struct{})}
		n.batch = b
	}
	b.add(payload, s.packed)
	if len(b.ends) == 1 {
		n.wakeUp()
	}
	n.mu.Unlock()

	if ctx.Done() == nil {
		<-b.done
		return b.err
	}
	select {
	case <-b.done:
		return b.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// add puts one more command into the batch: as an entry, or as a record of the
// last entry, after its length.
func (b *etcdBatch) add(payload []byte, packed bool) {
	if !packed {
		b.buf = append(b.buf, payload...)
		b.ends = append(b.ends, len(b.buf))
		return
	}
	last := len(b.ends) - 1
	start := 0
	if last > 0 {
		start = b.ends[last-1]
	}
	fits := last >= 0 && len(b.buf)-start+4+len(payload) <= etcdPack
	b.buf = binary.LittleEndian.AppendUint32(b.buf, uint32(len(payload)))
	b.buf = append(b.buf, payload...)
	if fits {
		b.ends[last] = len(b.buf)
	} else {
		b.ends = append(b.ends, len(b.buf))
	}
}

// entries returns the batch as raft takes it. They share its buffer, to which
// nothing is added any more.
func (b *etcdBatch) entries() []*raftpb.Entry {
	all := make([]raftpb.Entry, len(b.ends))
	entries := make([]*raftpb.Entry, len(b.ends))
	start := 0
	for i, end := range b.ends {
		all[i].Data = b.buf[start:end:end]
		entries[i] = &all[i]
		start = end
	}
	b.left = len(entries)
	return entries
}

// wakeUp makes the node's goroutine go round once more.
func (n *etcdNode) wakeUp() {
	select {
	case n.wake <- struct{}{}:
	default: // it has been told already
	}
}

// receive hands what comes from one peer to the node.
func (n *etcdNode) receive(conn net.Conn) {
	r := bufio.NewReaderSize(conn, 256<<10)
	var length [4]byte
	var body []byte // decoding copies what it keeps
	for {
		_, err := io.ReadFull(r, length[:])
		m := &raftpb.Message{}
		if err == nil {
			size := int(binary.LittleEndian.Uint32(length[:]))
			if cap(body) < size {
				body = make([]byte, size)
			}
			body = body[:size]
			_, err = io.ReadFull(r, body)
		}
		if err == nil {
			err = proto.Unmarshal(body, m)
		}
		if err != nil {
			n.sys.fail(fmt.Errorf("node %d: receiving: %w", n.id, err))
			return
		}
		n.mu.Lock()
		n.inbox = append(n.inbox, m)
		n.wakeUp()
		n.mu.Unlock()
	}
}

// run is the node's goroutine. When it ends, so do all waiting proposals.
func (n *etcdNode) run() {
	err := n.loop()
	n.sys.fail(fmt.Errorf("node %d: %w", n.id, err))
	n.mu.Lock()
	n.err = n.sys.failure
	flights := n.flights
	if n.batch != nil {
		flights = append(flights, n.batch)
	}
	n.mu.Unlock()
	for _, b := range flights {
		b.err = n.sys.failure
		close(b.done)
	}
}

func (n *etcdNode) loop() error {
	ticker := time.NewTicker(etcdTick)
	defer ticker.Stop()
	for {
		// Whoever can run now has something for the next round: more clients with
		// their proposals, more messages. Without this, rounds stay small where
		// there are few processors, and a sync for each is all there is time for.
		runtime.Gosched()
		if err := n.step(); err != nil {
			return err
		}
		if n.raw.HasReady() {
			if err := n.ready(); err != nil {
				return err
			}
			n.wakeUp() // there may be more, but a tick goes first
		}
		select {
		case <-n.sys.stopped:
			return errEtcdStopped
		case <-ticker.C:
			n.raw.Tick()
		case <-n.wake:
		}
	}
}

// step gives raft all that came in: messages, and one proposal of everything
// that clients queued.
func (n *etcdNode) step() error {
	n.mu.Lock()
	messages, batch := n.inbox, n.batch
	n.inbox, n.batch = n.spare[:0], nil
	if batch != nil {
		n.size = len(batch.buf)
	}
	n.mu.Unlock()
	for _, m := range messages {
		if err := n.raw.Step(m); err != nil {
			return err
		}
	}
	clear(messages)
	n.spare = messages
	if batch == nil {
		return nil
	}
	proposal := &raftpb.Message{Type: raftpb.MsgProp.Enum(), From: &n.id, Entries: batch.entries()}
	n.flights = append(n.flights, batch)
	return n.raw.Step(proposal)
}

// ready does what raft wants done. A leader's messages leave before its own
// disk is written, a follower's vouch for what is on its disk.
func (n *etcdNode) ready() error {
	rd := n.raw.Ready()
	if rd.SoftState != nil {
		n.leads = rd.RaftState == raft.StateLeader
		if n.sys.leader.Load() == n && !n.leads {
			return errors.New("it lost its leadership during the round; run it again on a quieter machine")
		}
	}
	if n.leads {
		if err := n.send(rd.Messages); err != nil {
			return err
		}
	}
	if !raft.IsEmptySnap(rd.Snapshot) {
		if err := n.install(rd.Snapshot); err != nil {
			return err
		}
	}
	if err := n.apply(rd.CommittedEntries); err != nil {
		return err
	}
	if n.woken {
		runtime.Gosched() // as in loop, and the disk would hold the processor
		n.woken = false
	}
	if err := n.wal.Save(rd.HardState, rd.Entries); err != nil {
		return err
	}
	if err := n.storage.Append(rd.Entries); err != nil {
		return err
	}
	if !n.leads {
		if err := n.send(rd.Messages); err != nil {
			return err
		}
	}
	n.raw.Advance(rd)
	return n.compact()
}

// send writes each peer's messages at once. It encodes them here because raft
// allows no entry to be stored meanwhile.
func (n *etcdNode) send(messages []*raftpb.Message) error {
	for _, p := range n.peers {
		p.buf = p.buf[:0]
		for _, m := range messages {
			if m.GetTo() != p.id {
				continue
			}
			at := len(p.buf)
			buf, err := proto.MarshalOptions{}.MarshalAppend(append(p.buf, 0, 0, 0, 0), m)
			if err != nil {
				return err
			}
			binary.LittleEndian.PutUint32(buf[at:], uint32(len(buf)-at-4))
			p.buf = buf
			if m.GetType() == raftpb.MsgSnap {
				n.raw.ReportSnapshot(p.id, raft.SnapshotFinish)
			}
		}
		if len(p.buf) == 0 {
			continue
		}
		if _, err := p.conn.Write(p.buf); err != nil {
			return fmt.Errorf("sending to node %d: %w", p.id, err)
		}
	}
	return nil
}

// apply applies committed entries and wakes the clients whose batches are done.
func (n *etcdNode) apply(entries []*raftpb.Entry) error {
	for _, e := range entries {
		n.applied = e.GetIndex()
		n.unkept += len(e.GetData()) + etcdEntryCost
		n.unsaved += len(e.GetData()) + etcdEntryCost
		if len(e.GetData()) == 0 {
			// A new leader's first entry.
			if n.leads && n.sys.leader.CompareAndSwap(nil, n) {
				close(n.sys.elected)
			}
			continue
		}
		if err := n.command(e.GetData()); err != nil {
			return err
		}
	}
	return nil
}

func (n *etcdNode) command(data []byte) error {
	if n.sys.packed {
		for rest := data; len(rest) > 0; {
			if len(rest) < 4 || len(rest)-4 < int(binary.LittleEndian.Uint32(rest)) {
				return errors.New("an entry ends within a command")
			}
			end := 4 + int(binary.LittleEndian.Uint32(rest))
			n.add(rest[4:end])
			rest = rest[end:]
		}
	} else {
		n.add(data)
	}
	if n.sys.leader.Load() != n {
		return nil
	}
	// What the leader applies next is what was proposed first.
	if len(n.flights) == 0 || !bytes.HasPrefix(n.flights[0].buf[n.flights[0].next:], data) {
		return errors.New("it applied another command than the one proposed")
	}
	b := n.flights[0]
	b.next += len(data)
	b.left--
	if b.left == 0 {
		n.flights = append(n.flights[:0], n.flights[1:]...)
		close(b.done)
		n.woken = true
	}
	return nil
}

// compact drops entries from memory that a follower hardly needs any more, and
// now and then has a snapshot written and older files removed.
func (n *etcdNode) compact() error {
	if n.unkept < n.sys.keep {
		return nil
	}
	snapshot, err := n.storage.CreateSnapshot(n.applied, nil, n.encode())
	if err != nil {
		return err
	}
	if err := n.storage.Compact(n.compactTo); err != nil && err != raft.ErrCompacted {
		return err
	}
	n.unkept, n.compactTo = 0, n.applied
	if n.unsaved < n.sys.snapshot || !n.saving.CompareAndSwap(false, true) {
		return nil
	}
	n.unsaved = 0
	n.sys.wg.Go(func() {
		defer n.saving.Store(false)
		err := n.save(snapshot)
		if err == nil {
			err = n.wal.ReleaseLockTo(snapshot.GetMetadata().GetIndex())
		}
		if err != nil {
			n.sys.fail(fmt.Errorf("node %d: snapshot: %w", n.id, err))
		}
	})
	return nil
}

// save makes a snapshot durable, first the file and then the record of it.
func (n *etcdNode) save(snapshot *raftpb.Snapshot) error {
	if err := n.snaps.SaveSnap(snapshot); err != nil {
		return err
	}
	m := snapshot.GetMetadata()
	return n.wal.SaveSnapshot(&walpb.Snapshot{Index: m.Index, Term: m.Term, ConfState: m.ConfState})
}

// install takes over the leader's snapshot.
func (n *etcdNode) install(snapshot *raftpb.Snapshot) error {
	if err := n.save(snapshot); err != nil {
		return err
	}
	if err := n.storage.ApplySnapshot(snapshot); err != nil {
		return err
	}
	n.applied = snapshot.GetMetadata().GetIndex()
	n.compactTo = n.applied
	return n.decode(snapshot.GetData())
}

// Check makes sure that the same leader applied exactly what was acknowledged.
func (s *etcdSystem) Check(ops int64, size int) error {
	select {
	case <-s.stopped:
		return s.failure
	default:
		return s.leader.Load().check(ops, size)
	}
}

// fail ends everything with the first failure.
func (s *etcdSystem) fail(err error) {
	s.once.Do(func() {
		s.failure = err
		close(s.stopped)
		for _, c := range s.conns {
			c.Close() // Ends the goroutines that read and write; nothing is left to report about it.
		}
	})
}

// Stop returns the failure that ended the system before, if there was one.
func (s *etcdSystem) Stop() error {
	s.fail(errEtcdStopped)
	s.wg.Wait()
	for _, ended := range s.purges {
		<-ended
	}
	var err error
	if s.failure != errEtcdStopped {
		err = s.failure
	}
	for _, n := range s.nodes {
		err = errors.Join(err, n.wal.Close())
	}
	return err
}

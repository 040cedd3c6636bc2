package raft

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"runtime"
	"slices"
	"sync"
	"time"
)

// Server is one node: a ConsensusModule, its storage and its state machine,
// and the connections to its peers. All methods may be called from any goroutine.
type Server struct {
	conf         Config
	cm           *ConsensusModule
	events       *eventLog
	storage      Storage
	machine      *applier
	listener     net.Listener
	dirID        [16]byte
	nonce        uint64
	boot         uint64          // how often the directory was opened
	history      []HistoryRecord // of the data directory
	restoredFrom *SnapshotMeta   // that the state machine was restored from at the start
	sessions     *sessionTable   // with it
	formWake     chan struct{}   // signalled when entry 1 is decided
	ctx          context.Context // ends when the node dies: every dial and wait
	cancel       context.CancelFunc
	ended        <-chan struct{} // closed when every goroutine has ended

	// Guarded by cm.mu.
	links     map[linkKey]*link
	forwards  map[memberID]int // unanswered batches of proposals
	formation *formation       // while forming
	boots     bootMemory       // of peers

	mu     sync.Mutex        // the innermost lock
	conns  map[net.Conn]bool // true: it has said who it is, or was dialled
	served map[servedKey]*servedConn
	logged map[string]bool // complaints already reported
	closed bool
}

// Start recovers a node's state and runs it. It returns once the node listens;
// forming a cluster, electing and catching up go on behind it. ctx bounds the
// recovery only; when it ends first, Start undoes what it did. The error is of
// Config.Validate, a *CorruptError or *IdentityError from the data directory,
// or of the listener.
func Start(ctx context.Context, c Config) (*Server, error) {
	if err := c.Validate(); err != nil {
		if c.Listener != nil {
			c.Listener.Close()
		}
		return nil, err
	}
	c = c.withDefaults()
	s := &Server{
		conf:     c,
		storage:  c.Storage,
		events:   &eventLog{node: c.ID, logger: c.Logger},
		links:    map[linkKey]*link{},
		forwards: map[memberID]int{},
		boots:    bootMemory{},
		conns:    map[net.Conn]bool{},
		served:   map[servedKey]*servedConn{},
		formWake: make(chan struct{}, 1),
		logged:   map[string]bool{},
		listener: c.Listener,
	}
	if s.storage == nil {
		s.storage = newDiskStorage(&c)
	}
	core, err := s.recover(ctx)
	if err == nil && s.listener == nil {
		s.listener, err = listen(ctx, c.Listen)
	}
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		if core != nil {
			s.storage.Close()
		}
		if s.listener != nil {
			s.listener.Close()
		}
		return nil, err
	}
	s.run(core)
	return s, nil
}

func listen(ctx context.Context, addr string) (net.Listener, error) {
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("raft: listen on %s: %w; set Config.Listen to a free address of this machine", addr, err)
	}
	return l, nil
}

// recover opens the storage and makes a core of what it holds. The core is nil
// if the storage was not opened.
func (s *Server) recover(ctx context.Context) (*core, error) {
	if d, ok := s.storage.(*diskStorage); ok {
		d.options.OnRead = s.progress("reads its log")
		d.onKept = func(err error) { s.emit(Event{Kind: EventSnapshotKept, Err: err}) }
	}
	rec, err := s.storage.Open(ctx, Identity{s.conf.ClusterID, s.conf.ID})
	if err != nil {
		return nil, err
	}
	s.dirID, s.boot, s.history = rec.DirectoryID, rec.Boot, rec.History
	for _, err := range rec.damaged {
		s.emit(Event{Kind: EventSnapshotFailed, Err: err})
	}
	var nonce [8]byte
	rand.Read(nonce[:])
	s.nonce = binary.LittleEndian.Uint64(nonce[:])
	var conf configuration
	if rec.Config != nil {
		conf, err = decodeConfiguration(rec.Config)
	}
	c := newCore(rec.ownNumber(s.conf.ID, s.dirID), s.conf.limits(), rec, conf, newDice(), time.Now())
	c.name, c.directory = s.conf.ID, s.dirID
	if err == nil {
		err = s.restoreState(ctx, c, &rec)
	}
	return c, err
}

// progressPause is between two events about how far Start has come.
const progressPause = time.Second

// progress returns what is told how far something that Start does has come, in
// bytes. If it takes long there are events, which are logged.
func (s *Server) progress(what string) func(done, total int64) {
	next := time.Now().Add(progressPause)
	return func(done, total int64) {
		if now := time.Now(); !now.Before(next) {
			next = now.Add(progressPause)
			s.emit(Event{Kind: EventStarting, Detail: fmt.Sprintf("%s, %d of %d MiB", what, done>>20, total>>20)})
			s.events.log()
		}
	}
}

// reportingReader tells how much of a snapshot was read.
type reportingReader struct {
	SnapshotReader
	report func(done, total int64)
}

func (r *reportingReader) ReadAt(p []byte, off int64) (int, error) {
	n, err := r.SnapshotReader.ReadAt(p, off)
	r.report(off+int64(n), r.Size())
	return n, err
}

// restoreState brings the state machine to where the log can go on. One that
// keeps its state on disk is left alone if it is there already.
func (s *Server) restoreState(ctx context.Context, c *core, rec *Recovered) error {
	if d, ok := s.conf.StateMachine.(OnDisk); ok {
		meta, sessions, err := loadMeta(d)
		if err != nil {
			return err
		}
		if len(rec.Snapshots) > 0 {
			c.restored(&rec.Snapshots[0])
		}
		if err := c.continues(meta); err != nil {
			return err
		}
		if meta.Last.Index > 0 && meta.Last.Index >= c.log.start.Index {
			s.restoredFrom, s.sessions = meta, sessions
			return nil
		}
	}
	err := s.restore(ctx, rec)
	if s.restoredFrom != nil {
		c.restored(s.restoredFrom)
	}
	return err
}

// restore restores the state machine from what restoreNewest chooses.
func (s *Server) restore(ctx context.Context, rec *Recovered) error {
	var err error
	s.restoredFrom, err = rec.restoreNewest(s.conf.Dir, func(meta *SnapshotMeta) (begun bool, err error) {
		_, r, err := s.storage.OpenSnapshot(meta.Last)
		if err == nil {
			begun = true
			report := s.progress(fmt.Sprintf("restores the snapshot up to entry %d", meta.Last.Index))
			s.sessions, err = callRestore(ctx, s.conf.StateMachine, meta, &reportingReader{r, report})
			r.Close()
		}
		if corrupt := (*CorruptError)(nil); errors.As(err, &corrupt) {
			s.emit(Event{Kind: EventSnapshotFailed, Index: meta.Last.Index, Err: err})
		}
		return begun, err
	})
	return err
}

func (s *Server) run(c *core) {
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.cm = newConsensusModule(s.storage, c, &s.conf, s.events)
	s.machine = newApplier(s.ctx, s.cm, &s.conf)
	if s.restoredFrom != nil {
		s.machine.restored(s.restoredFrom, s.sessions)
		s.cm.pending.applied, s.cm.pending.term = s.restoredFrom.Last.Index, s.restoredFrom.Last.Term
		s.cm.sessions = len(s.sessions.byID)
	}
	for _, h := range s.history {
		s.emit(Event{Kind: EventHistory, Detail: h.String()})
	}
	if s.cm.space != nil {
		s.cm.space.OnSpace(func() { wake(s.cm.flushWake) })
		wake(s.cm.flushWake) // the disk may be full already
	}
	s.cm.run(s, s.machine)
	s.cm.mu.Lock()
	s.ended = s.cm.goroutines.empty()
	s.cm.start(s.runAccept)
	if len(c.configuration.members) == 0 {
		s.startForming()
	}
	s.cm.unlock()
}

// stopped ends everything that waits on the network. The module's lock is held.
func (s *Server) stopped() {
	s.cancel()
	s.listener.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for conn := range s.conns {
		conn.Close()
	}
}

// Propose replicates cmd and returns once it is committed and applied on this
// node, with what this node's Apply returned. Any node takes proposals: one
// that does not lead forwards them to the leader. cmd is copied. The error is
// a rejection (ErrNoLeader, ErrOverloaded, ErrDiskFull, ErrStopped,
// ErrCommandSize, ErrSuperseded), after which cmd will never commit, or matches
// ErrOutcomeUnknown. ctx governs the wait, never the commit.
// While the queue of this node is full, calls wait for room in it, in turn.
func (s *Server) Propose(ctx context.Context, cmd []byte) (Result, error) {
	return s.await(ctx, func() *Proposal { return s.submit(entryCommand, nil, cmd, nil, true) })
}

// Submit is Propose without the wait. It never blocks; every error comes from
// the proposal's Wait. If the queue is full, or others wait for room in it, that
// is ErrOverloaded.
func (s *Server) Submit(cmd []byte) *Proposal {
	return s.submit(entryCommand, nil, cmd, nil, false)
}

// submit proposes an entry: head, and then cmd if it is one with a command. id
// is not nil for a command that has one. waits says that the caller waits for the
// proposal, and calls withdraw before it gives up.
func (s *Server) submit(kind entryKind, head, cmd []byte, id *RequestID, waits bool) *Proposal {
	p := &Proposal{done: make(chan struct{})}
	if kind == entryCommand || kind == entryOnce {
		if len(cmd) == 0 || len(cmd) > s.conf.MaxCommandBytes {
			p.finish(fmt.Errorf("%w: %d bytes, want 1 to %d (Config.MaxCommandBytes)", ErrCommandSize, len(cmd), s.conf.MaxCommandBytes))
			return p
		}
		if s.conf.history != nil {
			s.conf.history.submitted(s.conf.ID, cmd, id, p)
		}
	}
	if err := s.cm.queue.add(kind, head, cmd, p, waits); err != nil {
		p.finish(err)
		return p
	}
	if s.cm.queueReady() {
		// Whoever was woken together proposes together: let the others add
		// theirs first, so that all share one write and one frame.
		runtime.Gosched()
	}
	s.cm.tryStep()
	return p
}

// WaitApplied returns once this node has applied entry i: a write that another
// node acknowledged with Result.Index can then be read here. The error is
// ctx's, or matches ErrStopped, *ApplyError, or *SnapshotError of a Restore.
func (s *Server) WaitApplied(ctx context.Context, i Index) error {
	cm := s.cm
	cm.mu.Lock()
	w := &appliedWait{index: i, done: make(chan struct{})}
	cm.pending.wait(w)
	cm.core.want(i)
	cm.unlock()
	select {
	case <-w.done:
		return w.err
	case <-ctx.Done():
		cm.mu.Lock()
		cm.pending.cancel(w)
		cm.unlock()
		return ctx.Err()
	}
}

// WaitLeadership returns once this node leads and has applied everything
// committed before its term. The returned context ends with the leadership;
// the term is a fencing token. The error is ctx's or ErrStopped.
func (s *Server) WaitLeadership(ctx context.Context) (context.Context, Term, error) {
	cm := s.cm
	for {
		cm.mu.Lock()
		leading, term, changed := cm.leadership.ctx, cm.leadership.term, cm.leadership.changed
		cm.unlock()
		if leading != nil {
			return leading, term, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, 0, ctx.Err()
		case <-cm.done:
			return nil, 0, ErrStopped
		}
	}
}

// Done returns a channel that is closed when the node is dead and nothing of
// it is left: by Close, or by its own failure.
func (s *Server) Done() <-chan struct{} { return s.ended }

// Err returns nil while the node lives, then why it does not: ErrStopped after
// Close, otherwise the failure.
func (s *Server) Err() error {
	s.cm.mu.Lock()
	defer s.cm.unlock()
	switch c := s.cm.core; {
	case c.role != Dead:
		return nil
	case c.failure == nil:
		return ErrStopped
	default:
		return c.failure
	}
}

// Close stops the node: afterwards it has no goroutine, no open file, no port,
// and calls neither storage nor state machine. It hands nothing over; see
// Shutdown. A running Apply or fsync can't be interrupted: if one does not
// return in time, Close returns a *StillRunningError after at most 2 seconds,
// and calling it again waits again.
func (s *Server) Close() error {
	s.cm.step(func(c *core) { c.die(nil) })
	grace := time.NewTimer(s.conf.closeGrace)
	defer grace.Stop()
	select {
	case <-s.ended:
		return nil
	case <-grace.C:
		return &StillRunningError{
			Apply: Index(s.cm.applying.Load()), Flush: s.cm.flushing.Load() > 0, Snapshot: s.cm.writing.Load() > 0,
		}
	}
}

// Shutdown hands leadership over if this node leads, for at most one election
// timeout or until ctx ends, and then closes the node.
func (s *Server) Shutdown(ctx context.Context) error {
	handover, cancel := context.WithTimeout(ctx, s.conf.ElectionTimeout)
	defer cancel()
	// Any error means that there is nobody to hand over to, or no time.
	if s.TransferLeadership(handover, "") != nil {
		s.cm.step(func(c *core) { c.retire() })
	}
	return s.Close()
}

// Events yields what happened recently, whether ctx has ended or not, then what
// happens, until ctx ends or the node is dead. A slow reader misses events and is told how many by
// Event.Dropped; it never slows the node down.
func (s *Server) Events(ctx context.Context) iter.Seq[Event] { return s.events.all(ctx) }

// Status is a node's state at one moment.
type Status struct {
	ID        NodeID
	Addr      string // where it listens
	ClusterID string
	Role      Role
	Term      Term
	Leader    NodeID // "" if unknown
	Lease     bool   // this node leads and has a lease now: ReadLease asks nobody; see Config.LeaseDuration
	First     Index  // of the log; Last+1 if it is empty
	Last      Index
	Durable   Index // of Last, what is on this node's disk
	Commit    Index
	Applied   Index
	Snapshot  Index // the last entry that this node's newest snapshot includes
	Sessions  int   // open in the state as of Applied; one that expires is counted until the next entry about a session
	DiskFull  bool  // there is no space for the log to grow; see ErrDiskFull
	Members   []Member
	Missing   []NodeID         // founders that a forming node waits for
	Followers []FollowerStatus // on the leader
	Err       error            // why the node is dead, or applies nothing

	ClusterUUID string          // in hexadecimal; tells apart clusters with one ClusterID; all zeros while unformed
	History     []HistoryRecord // what was done to the data directory beside running a node, oldest first
}

// FollowerStatus is what a leader knows of a follower.
type FollowerStatus struct {
	ID          NodeID
	Match       Index     // durable there, as far as the leader knows
	LastContact time.Time // of an answer in this term
	DiskFull    bool      // it said so

	// While it is sent a snapshot: how much it has, of how much, in bytes.
	SnapshotSent, SnapshotSize int64
}

// Status returns the node's state. It waits for nothing, and works on a dead
// node too.
func (s *Server) Status() Status {
	cm := s.cm
	cm.mu.Lock()
	defer cm.unlock()
	c := cm.core
	cm.lookAtClock() // for the lease
	st := Status{
		ID: s.conf.ID, Addr: s.listener.Addr().String(), ClusterID: s.conf.ClusterID,
		Role: c.role, Term: c.currentTerm, Leader: c.leader.label(c), Lease: c.holdsLease(), Sessions: cm.sessions,
		First: c.log.start.Index + 1, Last: c.log.last, Durable: c.durableIndex,
		ClusterUUID: hex.EncodeToString(c.configuration.clusterUUID[:]), History: slices.Clone(s.history),
		Commit: c.commitIndex, Applied: cm.pending.applied, Snapshot: c.newestSnapshot.Index, DiskFull: c.full != nil, Err: c.failure,
	}
	if st.Err == nil && cm.pending.stopped != nil {
		st.Err = errors.Unwrap(cm.pending.stopped) // ErrStopped, or an *ApplyError
	}
	for _, m := range c.configuration.members {
		st.Members = append(st.Members, Member{ID: m.name, Addr: m.addr, Learner: m.learner})
	}
	for _, p := range c.progress {
		f := FollowerStatus{ID: p.id.label(c), Match: p.match, LastContact: p.lastContact, DiskFull: p.full}
		if p.state == snapshotting {
			f.SnapshotSent, f.SnapshotSize = int64(p.snapshotSent), int64(p.snapshotSize)
		}
		st.Followers = append(st.Followers, f)
	}
	if s.formation != nil {
		st.Missing = s.formation.missing()
	}
	return st
}

// selfID returns this node's membership.
func (s *Server) selfID() memberID {
	s.cm.mu.Lock()
	defer s.cm.unlock()
	return s.cm.core.self
}

// report makes an event of a complaint about a peer, once per peer and reason.
func (s *Server) report(peer NodeID, what string, err error) {
	if s.ctx.Err() != nil {
		return
	}
	peer = NodeID(printable(string(peer))) // strangers choose it
	key := string(peer) + "\x00" + what + "\x00" + reason(err)
	s.mu.Lock()
	known := s.logged[key] || len(s.logged) >= maxComplaints
	if !known {
		s.logged[key] = true
	}
	s.mu.Unlock()
	if !known {
		s.events.add([]Event{{Time: time.Now(), Kind: EventConnection, Peer: peer, Detail: what, Err: err}})
		s.events.log()
	}
}

const maxComplaints = 1024

// reason reduces an error to what makes it the same complaint again: addresses
// and counts in its text differ each time.
func reason(err error) string {
	var h *HandshakeError
	if errors.As(err, &h) {
		return h.Reason.String()
	}
	var op *net.OpError
	if errors.As(err, &op) {
		return op.Op
	}
	var n net.Error
	switch {
	case errors.Is(err, errFrame):
		return "frame"
	case errors.As(err, &n) && n.Timeout():
		return "timeout"
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return "hung up"
	}
	return fmt.Sprintf("%T", err)
}

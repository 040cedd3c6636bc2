package raft

import (
	"errors"
	"fmt"
	"net/rpc"
	"sync"
	"time"
)

// This file sends snapshots to followers and receives them (§7, Figure 13), on
// a connection of its own: appends and heartbeats flow meanwhile.

const (
	snapshotBlockBytes   = 1 << 20 // sent at once
	snapshotSyncBytes    = 8 << 20 // received between syncs
	maxSnapshotMetaBytes = 1 << 20
	snapshotReportEvery  = time.Second
)

// snapshot starts sending; the module's lock is held.
func (s *Server) snapshot(q snapshotRequest) {
	if s.cm.start(func() { s.runSnapshot(q) }) {
		s.cm.diskUsers.add()
	}
}

// runSnapshot sends a follower the newest snapshot. When it can't, the core asks
// again later, for what is the newest then.
func (s *Server) runSnapshot(q snapshotRequest) {
	defer s.cm.leaveDisk()
	last, err := s.sendSnapshot(q)
	s.cm.step(func(c *core) { c.snapshotSent(q, last, err) })
}

func (s *Server) label(id memberID) NodeID {
	s.cm.mu.Lock()
	defer s.cm.unlock()
	return id.label(s.cm.core)
}

var errSnapshotPointless = errors.New("raft: the follower needs no snapshot from here any more")

func (s *Server) sendSnapshot(q snapshotRequest) (last EntryID, err error) {
	s.cm.mu.Lock()
	newest, self := s.cm.core.newestSnapshot, s.cm.core.self
	s.cm.unlock()
	meta, r, err := s.storage.OpenSnapshot(newest)
	if err != nil {
		return last, s.unreadable(newest, err)
	}
	defer r.Close()
	now := time.Now()
	out := snapshotSender{server: s, request: q, reader: r, progress: now, reported: now}
	out.args = snapshotArgs{Term: q.term, Leader: self, Meta: meta, Size: uint64(r.Size())}
	return meta.Last, out.run()
}

// unreadable has another snapshot taken in place of a damaged one: once, though
// several transfers may find the damage, and again if that failed.
func (s *Server) unreadable(last EntryID, err error) error {
	var corrupt *CorruptError
	if errors.As(err, &corrupt) {
		s.cm.mu.Lock()
		if s.cm.captures.damaged != corrupt.File {
			s.cm.captures.damaged, s.cm.captures.again = corrupt.File, true
		}
		s.cm.transition(func(c *core) { c.emit(Event{Kind: EventSnapshotFailed, Index: last.Index, Err: err}) })
		s.cm.unlock()
		wake(s.cm.applyWake)
	}
	return err
}

// snapshotSender is one transfer: one block after the other, each answered by
// how much the follower has. It outlives connections: the follower keeps what
// it has, and only this snapshot continues it.
type snapshotSender struct {
	server   *Server
	request  snapshotRequest
	reader   SnapshotReader
	client   *rpcClient // of the connection now
	args     snapshotArgs
	buf      []byte
	offset   uint64    // the follower has this much
	progress time.Time // when that last grew
	began    time.Time // this connection's first block
	sent     int64     // bytes since then
	reported time.Time
}

// run sends until the follower has everything, or nothing more can come of it.
func (o *snapshotSender) run() error {
	s := o.server
	pause := s.conf.HeartbeatInterval
	for {
		before := o.progress
		done, err := o.connection()
		switch {
		case done || o.pointless(err):
			return err
		case time.Since(o.progress) > snapshotPatience*s.conf.ElectionTimeout:
			return err
		}
		s.report(s.label(o.request.to), "sending a snapshot", err)
		if pause = min(2*pause, s.conf.ElectionTimeout); o.progress.After(before) {
			pause = s.conf.HeartbeatInterval
		}
		s.pause(pause)
	}
}

// pointless tells whether another connection would change nothing.
func (o *snapshotSender) pointless(err error) bool {
	var corrupt *CorruptError
	return errors.Is(err, errSnapshotPointless) || errors.As(err, &corrupt) || o.server.stopping() || !o.goesOn(0)
}

// goesOn tells the core how much the follower has, and asks whether the
// transfer is still wanted.
func (o *snapshotSender) goesOn(term Term) (on bool) {
	o.server.cm.step(func(c *core) {
		if !c.stepDownFor(o.request.to, term) {
			on = c.snapshotProgress(o.request, o.offset, o.args.Size)
		}
	})
	return on
}

// connection sends on one connection. The first call carries nothing: it asks
// where to begin.
func (o *snapshotSender) connection() (done bool, err error) {
	s := o.server
	conn, client, _, err := s.dial(o.request.to, channelSnapshot)
	if err != nil {
		return false, err
	}
	defer s.forget(conn)
	defer client.Close()
	o.client, o.began, o.sent = client, time.Now(), 0
	o.args.Offset, o.args.Data = 0, nil
	for {
		r, err := o.call()
		if err != nil {
			return false, err
		}
		if r.Offset > o.args.Size {
			return false, fmt.Errorf("raft: the follower says it has %d bytes of a snapshot of %d", r.Offset, o.args.Size)
		}
		if r.Offset > o.offset {
			o.progress = time.Now()
		}
		o.offset = r.Offset
		on := o.goesOn(r.Term)
		switch {
		case r.Done:
			return true, nil
		case !on:
			return false, errSnapshotPointless
		}
		o.report()
		if err := o.next(); err != nil {
			return false, err
		}
		if err := o.pace(); err != nil {
			return false, err
		}
	}
}

// next reads the block that the follower lacks.
func (o *snapshotSender) next() error {
	n := min(snapshotBlockBytes, o.args.Size-o.offset)
	if uint64(cap(o.buf)) < n {
		o.buf = make([]byte, n)
	}
	o.args.Offset, o.args.Data = o.offset, o.buf[:n]
	if _, err := o.reader.ReadAt(o.args.Data, int64(o.offset)); err != nil {
		return o.server.unreadable(o.args.Meta.Last, err)
	}
	o.sent += int64(n)
	return nil
}

// call sends one block and waits for the answer. The follower may have to sync
// what it has, so it gets more time than for anything else.
func (o *snapshotSender) call() (*snapshotReply, error) {
	done := make(chan *rpc.Call, 1)
	reply := &call[snapshotReply]{}
	o.client.Go(methodSnapshot, &call[snapshotArgs]{V: o.args}, reply, done)
	if err := o.client.Flush(); err != nil {
		return nil, err
	}
	patience := 10 * o.server.linkPatience()
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case c := <-done:
		return &reply.V, c.Error
	case <-timer.C:
		return nil, fmt.Errorf("raft: a block of a snapshot was not answered for %v", patience)
	}
}

// pace waits until sending what was sent has taken the time that it should.
func (o *snapshotSender) pace() error {
	s := o.server
	due := time.Duration(float64(o.sent) / float64(s.conf.MaxSnapshotBytesPerSecond) * float64(time.Second))
	s.pause(due - time.Since(o.began))
	if s.stopping() {
		return ErrStopped
	}
	return nil
}

// report makes an event of the progress: where it begins again, and once a second.
func (o *snapshotSender) report() {
	if o.offset == 0 || o.sent > 0 && time.Since(o.reported) < snapshotReportEvery {
		return
	}
	o.reported = time.Now()
	s := o.server
	s.emit(Event{Kind: EventSnapshotProgress, Peer: s.label(o.request.to), Index: o.args.Meta.Last.Index, Detail: fmt.Sprintf("%d of %d bytes", o.offset, o.args.Size)})
	s.events.log()
}

// incomingSnapshot is what this node has received of a leader's snapshot. It
// outlives the connection, so that a transfer can go on.
type incomingSnapshot struct {
	mu       sync.Mutex // held across writes to the snapshot's file; only senders of snapshots wait for it
	id       [16]byte
	last     Index          // of what it includes
	w        SnapshotWriter // nil if there is none
	unsynced int
}

// take writes a block if it continues what is there, and says how much there
// is. It returns true if the snapshot is complete and durable; installed has
// then told the core. No other may be stored before that: a storage keeps two,
// and one of them must be the newest that the core knows.
func (in *incomingSnapshot) take(storage Storage, a *snapshotArgs, installed func()) (offset uint64, complete bool, err error) {
	in.mu.Lock()
	defer in.mu.Unlock()
	defer func() {
		if err != nil {
			in.drop()
		}
	}()
	if in.w == nil || in.id != a.Meta.ID {
		in.drop()
		if in.w, err = storage.CreateSnapshot(a.Meta); err != nil {
			return 0, false, err
		}
		in.id, in.last = a.Meta.ID, a.Meta.Last.Index
	}
	if uint64(in.w.Size()) == a.Offset {
		if _, err := in.w.Write(a.Data); err != nil {
			return 0, false, err
		}
		if in.unsynced += len(a.Data); in.unsynced >= snapshotSyncBytes {
			in.unsynced = 0
			if err := in.w.Sync(); err != nil {
				return 0, false, err
			}
		}
	}
	if offset = uint64(in.w.Size()); offset < a.Size {
		return offset, false, nil
	}
	if err := in.w.Commit(); err != nil {
		return 0, false, err
	}
	in.w = nil
	installed()
	return offset, true, nil
}

// drop forgets what was received; mu is held.
func (in *incomingSnapshot) drop() {
	if in.w != nil {
		in.w.Abort() // what it can't remove, the next start does
	}
	in.w, in.unsynced = nil, 0
}

// abort forgets what was received of a snapshot that ends at or before i: this
// node has one of its own up to there, or is at its end.
func (in *incomingSnapshot) abort(i Index) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.last <= i {
		in.drop()
	}
}

// serveSnapshots takes the blocks of a snapshot, one at a time.
func (c *servedConn) serveSnapshots(rpcs *rpc.Server) {
	defer wake(c.server.cm.flushWake) // a broken connection must not leave anything staged
	for {
		if rpcs.ServeRequest(c.codec) != nil {
			return
		}
		if c.codec.FlushReplies() != nil {
			return
		}
	}
}

var errWrongChannel = errors.New("raft: snapshots come on a connection of their own")

// InstallSnapshot takes one block. Its reply leaves when the term that it
// states is durable, like every reply.
func (v *service) InstallSnapshot(args *call[snapshotArgs], reply *call[snapshotReply]) error {
	if v.conn.channel != channelSnapshot {
		return errWrongChannel
	}
	s := v.conn.server
	cm := s.cm
	a, r := &args.V, &reply.V
	var err error
	wanted := false
	cm.stepThenFlush(func(c *core) {
		if err = v.checkSender(c, a.Leader); err == nil {
			wanted = c.onInstallSnapshot(a, r)
		}
	})
	if err == nil && wanted {
		cm.writing.Add(1)
		meta := a.Meta
		r.Offset, r.Done, err = cm.incoming.take(s.storage, a, func() {
			cm.stepThenFlush(func(c *core) { c.installSnapshot(&meta) })
		})
		cm.writing.Add(-1)
		if err != nil {
			s.report(v.conn.from, "receiving a snapshot", err)
		}
	}
	for cm.unflushed() && !s.stopping() {
		if flushErr := cm.flush(); flushErr != nil {
			return flushErr
		}
	}
	return err
}

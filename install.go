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

// runSnapshot sends a follower the newest snapshot. Where the connection
// breaks, the core asks again, and the follower keeps what it has.
func (s *Server) runSnapshot(q snapshotRequest) {
	defer s.cm.leaveDisk()
	last, err := s.sendSnapshot(q)
	if err != nil {
		s.report(s.label(q.to), "sending a snapshot", err)
	}
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
	conn, client, _, err := s.dial(q.to, channelSnapshot)
	if err != nil {
		return last, err
	}
	defer s.forget(conn)
	defer client.Close()
	out := snapshotSender{server: s, request: q, reader: r, client: client, began: time.Now(), reported: time.Now()}
	out.args = snapshotArgs{Term: q.term, Leader: self, Meta: meta, Size: uint64(r.Size())}
	return meta.Last, out.run()
}

// unreadable has another snapshot taken in place of a damaged one.
func (s *Server) unreadable(last EntryID, err error) error {
	var corrupt *CorruptError
	if errors.As(err, &corrupt) {
		s.cm.mu.Lock()
		s.cm.captures.again = true
		s.cm.transition(func(c *core) { c.emit(Event{Kind: EventSnapshotFailed, Index: last.Index, Err: err}) })
		s.cm.unlock()
		wake(s.cm.applyWake)
	}
	return err
}

// snapshotSender is one transfer: one block after the other, each answered by
// how much the follower has.
type snapshotSender struct {
	server   *Server
	request  snapshotRequest
	reader   SnapshotReader
	client   *rpcClient
	args     snapshotArgs
	buf      []byte
	began    time.Time
	sent     int64 // bytes since then
	reported time.Time
}

func (o *snapshotSender) run() error {
	s := o.server
	for { // the first call carries nothing: it asks where to begin
		r, err := o.call()
		if err != nil {
			return err
		}
		on := false
		s.cm.step(func(c *core) {
			if !c.stepDownFor(o.request.to, r.Term) {
				on = c.snapshotProgress(o.request, r.Offset, o.args.Size)
			}
		})
		switch {
		case r.Done:
			return nil
		case !on:
			return errSnapshotPointless
		case r.Offset > o.args.Size:
			return fmt.Errorf("raft: the follower says it has %d bytes of a snapshot of %d", r.Offset, o.args.Size)
		}
		o.report(r.Offset)
		if err := o.next(r.Offset); err != nil {
			return err
		}
		if err := o.pace(); err != nil {
			return err
		}
	}
}

// next reads the block at offset.
func (o *snapshotSender) next(offset uint64) error {
	n := min(snapshotBlockBytes, o.args.Size-offset)
	if uint64(cap(o.buf)) < n {
		o.buf = make([]byte, n)
	}
	o.args.Offset, o.args.Data = offset, o.buf[:n]
	if _, err := o.reader.ReadAt(o.args.Data, int64(offset)); err != nil {
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

// report makes an event of the progress, once a second.
func (o *snapshotSender) report(offset uint64) {
	now := time.Now()
	if offset == 0 || now.Sub(o.reported) < snapshotReportEvery && o.sent > 0 {
		return
	}
	o.reported = now
	peer := o.server.label(o.request.to)
	o.server.emit(Event{Kind: EventSnapshotProgress, Peer: peer, Index: o.args.Meta.Last.Index, Detail: fmt.Sprintf("%d of %d bytes", offset, o.args.Size)})
	o.server.events.log()
}

// incomingSnapshot is what this node has received of a leader's snapshot. It
// outlives the connection, so that a transfer can go on.
type incomingSnapshot struct {
	mu       sync.Mutex // held across writes to the snapshot's file; only senders of snapshots wait for it
	id       [16]byte
	w        SnapshotWriter // nil if there is none
	unsynced int
}

// take writes a block if it continues what is there, and says how much there
// is. It returns true if the snapshot is complete and durable.
func (in *incomingSnapshot) take(storage Storage, a *snapshotArgs) (offset uint64, complete bool, err error) {
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
		in.id = a.Meta.ID
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
	return offset, true, nil
}

// drop forgets what was received; mu is held.
func (in *incomingSnapshot) drop() {
	if in.w != nil {
		in.w.Abort() // what it can't remove, the next start does
	}
	in.w, in.unsynced = nil, 0
}

func (in *incomingSnapshot) abort() {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.drop()
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
		r.Offset, r.Done, err = cm.incoming.take(s.storage, a)
		cm.writing.Add(-1)
		if err != nil {
			s.report(v.conn.from, "receiving a snapshot", err)
		}
		if r.Done {
			meta := a.Meta
			cm.stepThenFlush(func(c *core) { c.installSnapshot(&meta) })
		}
	}
	for cm.unflushed() && !s.stopping() {
		if flushErr := cm.flush(); flushErr != nil {
			return flushErr
		}
	}
	return err
}

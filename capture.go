package raft

import (
	"bufio"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"runtime/debug"
	"time"
)

// This file takes snapshots of the state machine and restores it from them.
// The applier's goroutine makes every call into the state machine but one: the
// captured state is written on a goroutine of its own, while Apply goes on.

// captures is what the module knows of snapshots being taken. Guarded by cm.mu.
type captures struct {
	running  bool          // one is being taken
	again    bool          // the newest one is damaged, or the last attempt failed: another is due
	forSpace bool          // the disk is full: one would let the log go
	damaged  string        // the file of the newest one, until taking another has failed
	waiting  []chan error  // TakeSnapshot calls that the next one answers
	pause    time.Duration // after the last failure
	retryAt  time.Time     // not before, unless somebody asks for one
}

// snapshotPolicy says when a snapshot is due, and from where on the log stays.
type snapshotPolicy struct {
	everyBytes, everyEntries, keepBytes int64

	bytes, entries         int64 // applied in this run
	sinceBytes, sinceCount int64 // what they were at the last snapshot
	marks                  []logMark
}

// logMark says how much was applied when an entry was.
type logMark struct {
	index Index
	bytes int64
}

func (p *snapshotPolicy) applied(run Entries) {
	p.bytes += int64(run.size())
	p.entries += int64(run.Len())
	if n := len(p.marks); n == 0 || p.bytes-p.marks[n-1].bytes > p.keepBytes/16 {
		p.marks = append(p.marks, logMark{run.Last(), p.bytes})
	}
}

// restored begins anew behind a snapshot that ends at i.
func (p *snapshotPolicy) restored(i Index) {
	p.sinceBytes, p.sinceCount = p.bytes, p.entries
	p.marks = []logMark{{i, p.bytes}}
}

func (p *snapshotPolicy) due() bool {
	return p.everyBytes > 0 && p.bytes-p.sinceBytes >= p.everyBytes ||
		p.everyEntries > 0 && p.entries-p.sinceCount >= p.everyEntries
}

// take begins a new interval. It returns up to which entry the log need not be
// kept once the snapshot is durable, 0 if all of it must be.
func (p *snapshotPolicy) take() (upTo Index) {
	p.sinceBytes, p.sinceCount = p.bytes, p.entries
	n := 0
	for n < len(p.marks) && p.bytes-p.marks[n].bytes >= p.keepBytes {
		upTo = p.marks[n].index
		n++
	}
	if n > 1 {
		p.marks = append([]logMark(nil), p.marks[n-1:]...)
	}
	return upTo
}

// TakeSnapshot stores the state as of the last entry that this node has
// applied, and returns when that is durable. Nodes also take snapshots by
// themselves; see Config.SnapshotEveryBytes. One that runs already is waited
// for, and followed by another. The error is ctx's, a *SnapshotError, of the
// disk, or matches ErrStopped.
func (s *Server) TakeSnapshot(ctx context.Context) error {
	cm := s.cm
	answer := make(chan error, 1)
	cm.mu.Lock()
	stopped := cm.pending.stopped
	if stopped == nil {
		cm.captures.waiting = append(cm.captures.waiting, answer)
		wake(cm.applyWake)
	}
	cm.unlock()
	if stopped != nil {
		return fmt.Errorf("%w applying: %w", ErrStopped, errors.Unwrap(stopped))
	}
	select {
	case err := <-answer:
		return err
	case <-ctx.Done():
		return ctx.Err()
	case <-cm.done:
		return ErrStopped
	}
}

// capture begins a snapshot if one is due or asked for and none is running.
func (a *applier) capture() {
	cm := a.cm
	cm.mu.Lock()
	due := cm.captures.again || a.policy.due() || cm.captures.forSpace && a.policy.bytes > a.policy.sinceBytes
	if wait := time.Until(cm.captures.retryAt); due && wait > 0 {
		due = false
		if a.retry == nil {
			a.retry = time.After(wait)
		}
	}
	if cm.captures.running || cm.core.role == Dead || len(cm.captures.waiting) == 0 && !due {
		cm.unlock()
		return
	}
	waiting := cm.captures.waiting
	cm.captures.waiting = nil
	meta := SnapshotMeta{Last: EntryID{cm.pending.applied, cm.pending.term}, Time: a.lastTime, ConfigIndex: a.config.index, Config: a.config.data}
	news := meta.Last.Index > cm.core.newestSnapshot.Index || cm.captures.again
	cm.captures.again, cm.captures.forSpace = false, false
	cm.captures.running = news
	cm.unlock()
	if !news {
		answerAll(waiting, nil)
		return
	}
	rand.Read(meta.ID[:])
	sessions := a.sessions.encode(nil)
	meta.Sessions = uint64(len(sessions))
	upTo := a.policy.take()
	captured, err := a.callSnapshot(meta.Last.Index)
	started := false
	if err == nil {
		cm.mu.Lock()
		if started = cm.start(func() { a.runCapture(meta, sessions, upTo, captured, waiting) }); started {
			cm.diskUsers.add()
		}
		cm.unlock()
		if !started {
			captured.Close()
		}
	}
	if !started {
		a.captured(meta, upTo, err, waiting)
	}
}

// callSnapshot calls the state machine's Snapshot.
func (a *applier) callSnapshot(i Index) (c Capture, err error) {
	defer a.cm.applying.Store(0)
	a.cm.applying.Store(uint64(i))
	defer recovered("Snapshot", i, &err)
	c, err = a.machine.Snapshot()
	if err == nil && c == nil {
		err = fmt.Errorf("it returned neither a Capture nor an error")
	}
	if err != nil {
		return nil, &SnapshotError{Op: "Snapshot", Index: i, Err: err}
	}
	return c, nil
}

// recovered is deferred around a call into the state machine: a panic becomes a
// *SnapshotError, which is reported.
func recovered(op string, i Index, err *error) {
	if v := recover(); v != nil {
		*err = &SnapshotError{Op: op, Index: i, Err: fmt.Errorf("panic: %v", v), Stack: string(debug.Stack())}
	}
}

// runCapture makes a captured state durable, beside applying.
func (a *applier) runCapture(meta SnapshotMeta, sessions []byte, upTo Index, captured Capture, waiting []chan error) {
	cm := a.cm
	defer cm.leaveDisk()
	cm.writing.Add(1)
	w, err := cm.storage.CreateSnapshot(meta)
	if err == nil {
		if _, err = w.Write(sessions); err == nil {
			err = a.callWriteTo(meta.Last.Index, captured, w)
		}
		if err == nil && isClosed(cm.done) {
			err = ErrStopped
		}
		if err == nil {
			err = w.Commit()
		}
		if err == nil {
			cm.incoming.abort(meta.Last.Index)
		}
		if err != nil {
			w.Abort() // what it can't remove, the next start does
		}
	}
	closeErr := a.callClose(meta.Last.Index, captured)
	cm.writing.Add(-1)
	if err == nil {
		err = closeErr
	}
	a.captured(meta, upTo, err, waiting)
}

func (a *applier) callWriteTo(i Index, c Capture, w io.Writer) (err error) {
	defer recovered("WriteTo", i, &err)
	failing := &writerError{w: w}
	if err := c.WriteTo(a.ctx, failing); err != nil && failing.err == nil {
		return &SnapshotError{Op: "WriteTo", Index: i, Err: err}
	}
	return failing.err
}

func (a *applier) callClose(i Index, c Capture) (err error) {
	defer recovered("Close", i, &err)
	c.Close()
	return nil
}

// writerError remembers the error of a writer, which is the disk's and not of
// whoever writes.
type writerError struct {
	w   io.Writer
	err error
}

func (w *writerError) Write(p []byte) (int, error) {
	if w.err != nil {
		return 0, w.err
	}
	n, err := w.w.Write(p)
	w.err = err
	return n, err
}

// captured ends a snapshot that was begun: the log may go, or the failure is told.
func (a *applier) captured(meta SnapshotMeta, upTo Index, err error, waiting []chan error) {
	cm := a.cm
	cm.mu.Lock()
	cm.captures.running = false
	cm.captures.failed(err)
	cm.transition(func(c *core) {
		switch {
		case err == nil:
			c.snapshotTaken(meta.Last, upTo)
		case c.role != Dead:
			c.emit(Event{Kind: EventSnapshotFailed, Index: meta.Last.Index, Err: err})
		}
	})
	cm.unlock()
	answerAll(waiting, err)
	wake(cm.applyWake) // another may be asked for
}

// Pauses before a snapshot that failed is tried again.
const firstCapturePause, lastCapturePause = time.Second, time.Minute

// failed takes note of how the last attempt ended.
func (p *captures) failed(err error) {
	if err == nil {
		p.pause, p.retryAt = 0, time.Time{}
		return
	}
	p.again, p.damaged = true, ""
	p.pause = min(max(2*p.pause, firstCapturePause), lastCapturePause)
	p.retryAt = time.Now().Add(p.pause)
}

func answerAll(waiting []chan error, err error) {
	for _, c := range waiting {
		c <- err // it has room for the one answer
	}
}

// restore replaces the state by the snapshot that has replaced the log.
func (a *applier) restore(last EntryID) error {
	cm := a.cm
	meta, r, err := cm.storage.OpenSnapshot(last)
	if newest, _ := a.replaced(); err != nil && newest != last {
		return nil // newer ones came meanwhile, and it is gone
	}
	if err != nil {
		return fmt.Errorf("raft: open the snapshot up to entry %d: %w", last.Index, err)
	}
	defer r.Close()
	cm.applying.Store(uint64(last.Index))
	sessions, err := callRestore(a.ctx, a.machine, &meta, r)
	cm.applying.Store(0)
	if err != nil {
		return err
	}
	a.restored(&meta, sessions)
	cm.mu.Lock()
	var settled []*Proposal
	var woken []chan struct{}
	if cm.core.role != Dead { // otherwise die has told them
		settled, woken = cm.pending.jump(last)
		cm.sessions = len(sessions.byID)
	}
	cm.unlock()
	settle(settled, woken)
	return nil
}

// restored notes what the restored state includes.
func (a *applier) restored(meta *SnapshotMeta, sessions *sessionTable) {
	a.read, a.sessions = nil, sessions
	a.lastTime, a.config = meta.Time, configAt{meta.ConfigIndex, meta.Config}
	a.policy.restored(meta.Last.Index)
}

// callRestore reads the sessions of a snapshot and calls the state machine's
// Restore with the rest. An error of the reader, which says that the snapshot is
// damaged, comes back as it is.
func callRestore(ctx context.Context, m StateMachine, meta *SnapshotMeta, r SnapshotReader) (sessions *sessionTable, err error) {
	defer recovered("Restore", meta.Last.Index, &err)
	if sessions, err = readSessions(meta, r); err != nil {
		return nil, err
	}
	at := int64(meta.Sessions)
	in := &contextReader{ctx: ctx, r: io.NewSectionReader(r, at, r.Size()-at)}
	if d, ok := m.(OnDisk); ok {
		err = d.RestoreOnDisk(bufio.NewReaderSize(in, 256<<10), sessions.rows(meta))
	} else {
		err = m.Restore(bufio.NewReaderSize(in, 256<<10))
	}
	if err != nil && in.err == nil {
		return nil, &SnapshotError{Op: "Restore", Index: meta.Last.Index, Err: err}
	}
	return sessions, in.err
}

// readSessions reads the sessions, with which a snapshot begins. What is wrong
// with them is no damage, which a checksum would have shown.
func readSessions(meta *SnapshotMeta, r SnapshotReader) (*sessionTable, error) {
	err := error(errSessions)
	var sessions *sessionTable
	if meta.Sessions <= uint64(r.Size()) {
		b := make([]byte, meta.Sessions)
		if n, err := r.ReadAt(b, 0); n < len(b) {
			return nil, err
		}
		sessions, err = decodeSessions(b)
	}
	if err != nil {
		return nil, fmt.Errorf("raft: the snapshot up to entry %d can't be used: %w; a newer version of this program may have written it", meta.Last.Index, err)
	}
	return sessions, nil
}

// contextReader ends with ctx, and remembers why reading failed.
type contextReader struct {
	ctx context.Context
	r   io.Reader
	err error
}

func (r *contextReader) Read(p []byte) (int, error) {
	if r.err == nil {
		r.err = r.ctx.Err()
	}
	if r.err != nil {
		return 0, r.err
	}
	n, err := r.r.Read(p)
	if err != nil && err != io.EOF {
		r.err = err
	}
	return n, err
}

// lastTimeOf returns the time of the newest entry in run.
func lastTimeOf(run Entries) time.Time { return run.entry(run.Len() - 1).Time }

package memnet

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"syscall"
	"time"
)

// conn is one end of a connection, a net.Conn. Its fields are guarded by
// Network.mu.
type conn struct {
	net           *Network
	local, remote Addr
	peer          *conn
	in, out       *pipe // out is the peer's in
	closed        bool  // by its owner
	reset         bool
	readDeadline  time.Time
	writeDeadline time.Time
}

// newPair returns the two ends of a new connection.
func (n *Network) newPair(dialler, acceptor Addr, out, back *link) (dialled, accepted *conn) {
	there, here := n.newPipe(out), n.newPipe(back)
	dialled = &conn{net: n, local: dialler, remote: acceptor, in: here, out: there}
	accepted = &conn{net: n, local: acceptor, remote: dialler, in: there, out: here}
	dialled.peer, accepted.peer = accepted, dialled
	n.conns = append(n.conns, dialled, accepted)
	return dialled, accepted
}

// pipe is one direction of a connection. Its stream has positions as TCP's has:
// each byte is one, and so is the end of the stream. Positions up to arrived
// can be read; those above are on their way (listed in flight) or, while the
// link is blocked, held by the sender (and flight is empty). All is guarded by
// Network.mu.
type pipe struct {
	net  *Network
	link *link

	buf       bytes.Buffer // the bytes from read to written
	read      int64        // bytes taken by the reader
	arrived   int64
	written   int64     // bytes, plus one for the end of the stream once finished
	flight    []segment // ends and times ascending; the last one's end is written
	blocked   bool      // the link is cut or stalled
	finished  bool      // the sender has closed its side
	lossy     bool      // a filter said Drop: nothing more is put into the stream
	swallowed int64     // bytes accepted while lossy
	gone      bool      // the receiver has closed
	refused   bool      // bytes reached a receiver that is gone, and it said so

	waiters int           // readers that wait
	told    bool          // one of them is being told, and will look once it has the lock
	wake    chan struct{} // capacity 1: tells one waiter to look again
	timer   *time.Timer   // kept from the last wait, for the next
}

// segment is a piece of the stream that arrives as one.
type segment struct {
	end int64
	at  time.Time
}

func (n *Network) newPipe(l *link) *pipe {
	return &pipe{net: n, link: l, blocked: !n.passes(l), wake: make(chan struct{}, 1)}
}

// Read waits until bytes have arrived, the stream has ended, the deadline has
// passed, or the connection is closed or reset.
func (c *conn) Read(b []byte) (int, error) {
	c.net.mu.Lock()
	defer c.net.mu.Unlock()
	for {
		k, ready, err := c.tryRead(b)
		if ready {
			// Whatever woke this reader may concern the next one too; only one
			// is ever told, so each passes it on.
			c.in.signal()
			if err != nil && err != io.EOF {
				err = c.opError("read", err)
			}
			return k, err
		}
		c.in.wait(c.readDeadline)
	}
}

// tryRead reads what can be read now. It reports whether Read is done.
func (c *conn) tryRead(b []byte) (k int, ready bool, err error) {
	switch {
	case c.closed:
		return 0, true, net.ErrClosed
	case c.reset:
		return 0, true, syscall.ECONNRESET
	case passed(c.readDeadline):
		return 0, true, os.ErrDeadlineExceeded
	case len(b) == 0:
		return 0, true, nil
	}
	p := c.in
	p.land()
	if k := p.readable(); k > 0 {
		k, _ = p.buf.Read(b[:min(k, len(b))])
		p.read += int64(k)
		if p.buf.Len() == 0 && p.buf.Cap() > 1<<20 {
			p.buf = bytes.Buffer{} // One burst must not pin its memory for ever.
		}
		return k, true, nil
	}
	if p.finished && !p.lossy && p.arrived == p.written {
		return 0, true, io.EOF
	}
	return 0, false, nil
}

// Write never blocks: it accepts all of b or, over the cap, nothing.
func (c *conn) Write(b []byte) (int, error) {
	k, err := c.filteredWrite(b)
	if err != nil {
		err = c.opError("write", err)
	}
	return k, err
}

func (c *conn) filteredWrite(b []byte) (int, error) {
	n, l := c.net, c.out.link
	n.mu.Lock()
	err, filter := c.writeError(len(b)), l.filter
	if err != nil || filter == nil || len(b) == 0 {
		defer n.mu.Unlock()
		if err != nil {
			return 0, err
		}
		return c.out.accept(b)
	}
	n.mu.Unlock()

	// The filter may call the network, so it is asked without the network's
	// lock; its own lock is kept until the bytes are queued, so that the
	// order it saw is the order on the wire.
	l.filterMu.Lock()
	defer l.filterMu.Unlock()
	verdict := filter(b)
	n.mu.Lock()
	defer n.mu.Unlock()
	if verdict == Break {
		c.resetBoth()
	}
	if err := c.writeError(len(b)); err != nil {
		return 0, err
	}
	if verdict == Drop {
		c.out.lossy = true
	}
	return c.out.accept(b)
}

// writeError says why k bytes cannot be accepted now.
func (c *conn) writeError(k int) error {
	p := c.out
	switch {
	case c.closed:
		return net.ErrClosed
	case c.reset:
		return syscall.ECONNRESET
	case passed(c.writeDeadline):
		return os.ErrDeadlineExceeded
	case p.finished:
		return syscall.EPIPE
	}
	if p.gone && !p.lossy && c.net.passes(p.link) && c.net.passes(c.in.link) {
		p.refused = p.refused || p.unread() > 0
		p.written = p.read
		if p.refused {
			return syscall.EPIPE
		}
	}
	if held := p.unread(); held+int64(k) > int64(c.net.writeCap) {
		return timeoutError(fmt.Sprintf("%s has not read %d bytes, and %d more would exceed the in-memory network's cap of %d: "+
			"the peer hangs, is cut off, or is too slow (SetWriteCap changes the cap)", c.remote, held, k, c.net.writeCap))
	}
	return nil
}

// accept takes b, which writeError has allowed.
func (p *pipe) accept(b []byte) (int, error) {
	switch {
	case len(b) == 0:
	case p.gone:
		// The peer's host answers with a reset, but the writer learns of it
		// only at its next write.
		p.written += int64(len(b))
	case p.lossy:
		p.swallowed += int64(len(b))
	default:
		p.buf.Write(b)
		p.send(int64(len(b)))
	}
	return len(b), nil
}

// send extends the stream by k positions and sets off what was not yet on its way.
func (p *pipe) send(k int64) {
	p.written += k
	if !p.blocked {
		p.launch()
	}
}

// launch puts everything from the end of the flight on its way, so that it
// arrives after a delay and not before what is ahead of it.
func (p *pipe) launch() {
	var at time.Time
	if d := p.link.draw(); d > 0 {
		at = time.Now().Add(d)
	}
	if len(p.flight) > 0 {
		p.land()
	}
	last := len(p.flight) - 1
	if last >= 0 && !at.After(p.flight[last].at) {
		p.flight[last].end = p.written
		return
	}
	if at.IsZero() {
		p.arrived = p.written
		p.signal()
		return
	}
	p.flight = append(p.flight, segment{end: p.written, at: at})
	if last < 0 {
		p.signal() // The reader has to wait for a certain time now.
	}
}

// land moves what has arrived by now out of the flight.
func (p *pipe) land() {
	if len(p.flight) == 0 {
		return
	}
	now := time.Now()
	k := 0
	for k < len(p.flight) && !p.flight[k].at.After(now) {
		p.arrived = p.flight[k].end
		k++
	}
	p.flight = p.flight[k:]
}

// setBlocked stops or resumes the stream. What is on its way when it stops is
// sent again when it resumes.
func (p *pipe) setBlocked(blocked bool) {
	if blocked == p.blocked {
		return
	}
	p.blocked = blocked
	if blocked {
		p.land()
		p.flight = nil
		return
	}
	if p.written > p.arrived {
		p.launch()
	}
}

// readable returns how many bytes have arrived and were not read.
func (p *pipe) readable() int {
	return min(int(p.arrived-p.read), p.buf.Len())
}

// unread returns how many bytes an unfinished stream has accepted and not
// handed to the reader.
func (p *pipe) unread() int64 {
	return p.written - p.read + p.swallowed
}

// signal tells one waiting reader, if there is any, to look again.
func (p *pipe) signal() {
	if p.waiters > 0 && !p.told {
		p.told = true
		p.wake <- struct{}{} // Its buffer is empty, because nobody was being told.
	}
}

// wait gives up the lock until something has changed, bytes arrive, or the
// deadline passes.
func (p *pipe) wait(deadline time.Time) {
	until := deadline
	if len(p.flight) > 0 && (until.IsZero() || p.flight[0].at.Before(until)) {
		until = p.flight[0].at
	}
	var timer *time.Timer
	var fired <-chan time.Time
	if !until.IsZero() {
		timer, p.timer = p.timer, nil
		if timer == nil {
			timer = time.NewTimer(time.Until(until))
		} else {
			timer.Reset(time.Until(until))
		}
		fired = timer.C
	}
	p.waiters++
	p.net.mu.Unlock()
	told := false
	select {
	case <-p.wake:
		told = true
	case <-fired:
	}
	p.net.mu.Lock()
	p.waiters--
	if p.told && !told && p.waiters == 0 {
		<-p.wake // It was meant for this reader, and would wake the next one for nothing.
		told = true
	}
	if told {
		p.told = false
	}
	if timer != nil {
		timer.Stop()
		p.timer = timer
	}
}

// Close ends the stream to the peer, which still reads what was written, and
// fails this end's blocked calls. It may be called again.
func (c *conn) Close() error {
	c.net.mu.Lock()
	defer c.net.mu.Unlock()
	c.close()
	return nil
}

func (c *conn) close() {
	if c.closed {
		return
	}
	c.closed = true
	i := slices.Index(c.net.conns, c)
	c.net.conns = slices.Delete(c.net.conns, i, i+1)
	c.out.finish()
	c.in.abandon()
}

// CloseWrite ends the stream to the peer; this end can still read.
func (c *conn) CloseWrite() error {
	c.net.mu.Lock()
	defer c.net.mu.Unlock()
	if err := c.usable(); err != nil {
		return c.opError("close", err)
	}
	c.out.finish()
	return nil
}

// finish puts the end of the stream behind the bytes written so far.
func (p *pipe) finish() {
	if !p.finished {
		p.finished = true
		p.send(1)
	}
}

// abandon is the receiver's end of the pipe: its memory goes, and what the
// sender has not heard of stays counted.
func (p *pipe) abandon() {
	p.gone = true
	p.buf, p.flight = bytes.Buffer{}, nil
	p.signal()
}

// resetBoth fails both ends; what was not read is lost.
func (c *conn) resetBoth() {
	for _, end := range []*conn{c, c.peer} {
		end.reset = true
		end.in.abandon()
	}
}

func (c *conn) usable() error {
	switch {
	case c.closed:
		return net.ErrClosed
	case c.reset:
		return syscall.ECONNRESET
	}
	return nil
}

func (c *conn) LocalAddr() net.Addr  { return c.local }
func (c *conn) RemoteAddr() net.Addr { return c.remote }

// SetDeadline sets both deadlines.
func (c *conn) SetDeadline(t time.Time) error { return c.setDeadlines(&t, &t) }

// SetReadDeadline also holds for a Read that is already waiting.
func (c *conn) SetReadDeadline(t time.Time) error { return c.setDeadlines(&t, nil) }

// SetWriteDeadline fails writes that begin after t; none lasts any time.
func (c *conn) SetWriteDeadline(t time.Time) error { return c.setDeadlines(nil, &t) }

func (c *conn) setDeadlines(read, write *time.Time) error {
	c.net.mu.Lock()
	defer c.net.mu.Unlock()
	if c.closed {
		return c.opError("set", net.ErrClosed)
	}
	if write != nil {
		c.writeDeadline = *write
	}
	if read != nil {
		c.readDeadline = *read
		c.in.signal()
	}
	return nil
}

func (c *conn) opError(op string, err error) error {
	return &net.OpError{Op: op, Net: c.local.Network(), Source: c.local, Addr: c.remote, Err: err}
}

// passed reports whether a deadline is set and over.
func passed(deadline time.Time) bool {
	return !deadline.IsZero() && !deadline.After(time.Now())
}

// timeoutError is a failure that callers treat as a passed deadline.
type timeoutError string

func (e timeoutError) Error() string        { return string(e) }
func (e timeoutError) Is(target error) bool { return target == os.ErrDeadlineExceeded }
func (e timeoutError) Timeout() bool        { return true }

package raft

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/rpc"
	"sync/atomic"
	"syscall"
	"time"
)

// This file is the inbound half of a node: it accepts connections, asks who is
// there, and serves what the connection is for.

// maxConnections is how many connections there may be at once, inbound and
// outbound. When there are more, one that has not said who it is makes room:
// strangers can't lock peers out, who greet within a moment.
const maxConnections = 256

// inboundIdleTimeout ends an inbound connection on which nothing comes. Peers
// close a connection much sooner, unless they are gone without a word.
const inboundIdleTimeout = time.Minute

// runAccept starts a goroutine for each connection.
func (s *Server) runAccept() {
	defer s.listener.Close()
	backoff := time.Duration(0)
	for {
		conn, err := s.listener.Accept()
		if err != nil {
			if s.ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				if s.ctx.Err() == nil {
					s.cm.fail(fmt.Errorf("raft: the listener was closed from outside: %w", err))
				}
				return
			}
			// Out of file descriptors, most likely: it passes.
			backoff = min(max(2*backoff, 5*time.Millisecond), time.Second)
			s.report("", "accept", err)
			s.pause(backoff)
			continue
		}
		backoff = 0
		if !s.remember(conn, maxConnections) {
			conn.Close()
			continue
		}
		s.cm.mu.Lock()
		started := s.cm.start(func() { s.serve(conn) })
		s.cm.unlock()
		if !started {
			s.forget(conn)
		}
	}
}

// pause waits for d or until the node stops.
func (s *Server) pause(d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-s.ctx.Done():
	}
}

// remember makes stopped close conn. It returns false if the node stops or has
// limit connections already (0: no limit), all of them known.
func (s *Server) remember(conn net.Conn, limit int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || limit > 0 && len(s.conns) >= limit && !s.evict() {
		return false
	}
	s.conns[conn] = limit == 0
	return true
}

// evict closes some connection that has not said who it is, and returns false
// if there is none. mu is held.
func (s *Server) evict() bool {
	for conn, known := range s.conns {
		if !known {
			conn.Close()
			delete(s.conns, conn)
			return true
		}
	}
	return false
}

// greeted notes that conn has said who it is. It returns false if conn was
// closed meanwhile.
func (s *Server) greeted(conn net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, there := s.conns[conn]
	if there {
		s.conns[conn] = true
	}
	return there
}

// forget closes conn.
func (s *Server) forget(conn net.Conn) {
	conn.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, conn)
}

// serve owns one inbound connection to its end.
func (s *Server) serve(raw net.Conn) {
	defer s.forget(raw)
	conn := raw
	if s.conf.TLS != nil {
		conn = tls.Server(raw, s.conf.TLS)
	}
	h, w, err := s.accept(conn)
	if err != nil {
		s.report(peerName(h, raw), "accepting", err)
		return
	}
	if !s.greeted(raw) {
		return
	}
	if h.Channel != channelFormation {
		s.serveRPC(conn, h, w)
	} else if err := s.answerFormation(conn, h); err != nil {
		s.report(h.From, "forming", err)
	}
}

// peerName names a peer for reports: by its ID, or by its host if it gave none.
func peerName(h hello, conn net.Conn) NodeID {
	if h.From != "" {
		return h.From
	}
	host, _, _ := net.SplitHostPort(conn.RemoteAddr().String())
	return NodeID(host)
}

// servedKey: a peer has one connection per channel. A new one replaces the old.
type servedKey struct {
	from    NodeID
	channel channel
}

// servedConn is one inbound connection of a peer.
type servedConn struct {
	server  *Server
	from    NodeID
	channel channel
	codec   *serverCodec
	open    atomic.Int32  // requests without a reply yet
	ready   chan struct{} // signalled at each reply
	ended   chan struct{}
	next    chan struct{} // holds one token: whoever may wait to replace this
}

// ticket is the token of one request: where its reply goes.
type ticket struct {
	conn *servedConn
	seq  uint64
}

// reply is called with the module's lock held, when the reply may leave.
func (t ticket) reply(m message) {
	if m.voteReply != nil {
		t.conn.codec.WriteDeferred(t.seq, m.voteReply)
	} else {
		t.conn.codec.WriteDeferred(t.seq, m.appendReply)
	}
	t.conn.open.Add(-1)
	wake(t.conn.ready)
}

// serveRPC serves a peer's control or append connection. It ends when the
// connection does.
func (s *Server) serveRPC(conn net.Conn, h hello, w welcome) {
	c := &servedConn{
		server: s, from: h.From, channel: h.Channel, codec: newServerCodec(conn, w.Version, s.codecLimits(h.Channel)),
		ready: make(chan struct{}, 1), ended: make(chan struct{}), next: make(chan struct{}, 1),
	}
	if !s.replace(servedKey{h.From, h.Channel}, c) {
		return
	}
	defer s.peerLeft(c)
	defer s.unserve(servedKey{h.From, h.Channel}, c)
	s.cm.mu.Lock()
	alive := s.cm.core.role != Dead
	if alive {
		s.cm.diskUsers.add()
	}
	s.cm.unlock()
	if !alive {
		return
	}
	defer s.cm.leaveDisk()
	rpcs := rpc.NewServer()
	if err := rpcs.RegisterName(serviceName, &service{c}); err != nil {
		s.cm.fail(err) // a mistake in this package
		return
	}
	switch h.Channel {
	case channelAppend:
		c.serveAppends(rpcs)
	case channelSnapshot:
		c.serveSnapshots(rpcs)
	default:
		c.serveControl(rpcs)
	}
	c.codec.Close()
	if err := c.codec.Err(); errors.Is(err, errFrame) {
		s.report(h.From, "hung up", err)
	}
}

// peerLeft tells the core if c, which has ended, was the last of the connections
// on which a peer, perhaps the leader, sends what leaders send, and was closed
// by the peer itself.
func (s *Server) peerLeft(c *servedConn) {
	if !closedByPeer(c.codec.Err()) {
		return
	}
	s.mu.Lock()
	left := s.served[servedKey{c.from, channelControl}] == nil && s.served[servedKey{c.from, channelAppend}] == nil
	s.mu.Unlock()
	if left {
		s.cm.step(func(core *core) {
			if m := core.configuration.byName(c.from); m != nil {
				core.leaderLeft(m.id)
			}
		})
	}
}

// closedByPeer tells whether err is how a connection ends whose other side has
// closed it, or whose process was killed.
func closedByPeer(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// replace makes c the connection of k. The old one is closed, and c waits for
// its loop to return, so that two connections of a peer never interleave. Only
// one may wait; false means that c is to be closed.
func (s *Server) replace(k servedKey, c *servedConn) bool {
	for {
		s.mu.Lock()
		old := s.served[k]
		if old == nil {
			s.served[k] = c
			s.mu.Unlock()
			return !s.stopping()
		}
		s.mu.Unlock()
		old.codec.Close()
		select {
		case old.next <- struct{}{}:
		default:
			return false
		}
		select {
		case <-old.ended:
		case <-s.ctx.Done():
			return false
		}
	}
}

// unserve forgets c, which has ended, unless it was replaced.
func (s *Server) unserve(k servedKey, c *servedConn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.served[k] == c {
		delete(s.served, k)
	}
	close(c.ended)
}

func (s *Server) stopping() bool { return s.ctx.Err() != nil }

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// serveAppends is the follower's append loop: step every request that has
// arrived, make it all durable at once, write all replies at once.
func (c *servedConn) serveAppends(rpcs *rpc.Server) {
	cm := c.server.cm
	defer wake(cm.flushWake) // a broken connection must not leave anything staged
	for {
		if rpcs.ServeRequest(c.codec) != nil {
			return
		}
		for c.codec.Buffered() {
			if rpcs.ServeRequest(c.codec) != nil {
				return
			}
		}
		// A reply may have left already, and yet the step may have staged something.
		for c.open.Load() > 0 || cm.unflushed() {
			if cm.flush() != nil || c.server.stopping() {
				return
			}
		}
		if c.codec.FlushReplies() != nil {
			return
		}
	}
}

// serveControl answers votes, heartbeats and forwarded proposals. It never
// flushes: a reply that waits for the hard state is released by whoever does.
func (c *servedConn) serveControl(rpcs *rpc.Server) {
	for {
		if rpcs.ServeRequest(c.codec) != nil {
			return
		}
		for c.open.Load() > 0 {
			select {
			case <-c.ready:
			case <-c.server.ctx.Done():
				return
			}
		}
		if c.codec.FlushReplies() != nil {
			return
		}
	}
}

// service is what net/rpc calls. It is registered under the name
// "ConsensusModule", one per connection, and never seen by users.
type service struct{ conn *servedConn }

var errWrongSender = errors.New("raft: the request names another node than the connection's")

func (v *service) RequestVote(args *call[voteArgs], reply *call[voteReply]) error {
	cm := v.conn.server.cm
	reply.deferred = true
	var err error
	cm.step(func(c *core) {
		if err = v.checkSender(c, args.V.Candidate); err == nil {
			v.conn.open.Add(1)
			c.onVoteRequest(&args.V, ticket{v.conn, args.req.seq})
		}
	})
	return err
}

func (v *service) AppendEntries(args *call[appendArgs], reply *call[appendReply]) error {
	cm := v.conn.server.cm
	reply.deferred = true
	var err error
	if !args.V.Heartbeat {
		cm.claim(args.V.Entries)
	}
	f := func(c *core) {
		if err = v.checkSender(c, args.V.Leader); err == nil {
			v.conn.open.Add(1)
			c.room = cm.room()
			c.onAppendRequest(&args.V, ticket{v.conn, args.req.seq})
		}
	}
	if args.V.Heartbeat {
		cm.step(f)
	} else {
		cm.stepThenFlush(f)
	}
	return err
}

// claim waits until there is space for entries that have come, or there can't be.
// Otherwise the write would wait for it.
func (cm *ConsensusModule) claim(runs []Entries) {
	if cm.space == nil || len(runs) == 0 {
		return
	}
	n := int64(0)
	for _, e := range runs {
		n += saveBytes(e)
	}
	cm.flushing.Add(1)
	defer cm.flushing.Add(-1)
	cm.space.Claim(n)
}

// Forward appends another node's proposals. The reply says what they became;
// their results are that node's own affair.
func (v *service) Forward(args *call[forwardArgs], reply *call[forwardReply]) error {
	var b entryBuilder
	if err := b.addUnsealed(args.V.Encoded); err != nil {
		return err
	}
	for i := range b.offs {
		if size, ok := b.commandSize(i); ok && (size == 0 || size > v.conn.server.conf.MaxCommandBytes) {
			reply.V.Refusal = forwardSize
			return nil
		}
	}
	cm := v.conn.server.cm
	cm.step(func(c *core) {
		r := &reply.V
		r.Leader = c.leader
		r.Refusal = c.refusal(args.V.From)
		if r.Refusal == forwardAccepted && cm.roomFor(len(b.buf)) == 0 {
			r.Refusal = forwardBusy
		}
		if r.Refusal == forwardAccepted {
			r.First = c.proposeFor(args.V.From, &b)
			c.onForward(args.V.From, r.First.Index+Index(len(b.offs))-1)
		}
	})
	return nil
}

// checkSender refuses requests in the name of a member other than the one that
// the handshake established.
func (v *service) checkSender(c *core, id memberID) error {
	if m := c.configuration.find(id); m != nil && m.name != v.conn.from {
		return errWrongSender
	}
	return nil
}

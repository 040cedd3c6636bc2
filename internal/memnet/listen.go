package memnet

import (
	"context"
	"fmt"
	"net"
	"os"
	"strconv"
	"syscall"
	"time"
)

// Listen starts to listen on addr, which is "host:port" with any host name.
// Port 0 picks a free port. An address that is in use gives EADDRINUSE.
func (n *Network) Listen(addr string) (net.Listener, error) {
	a := Addr(addr)
	fail := func(err error) (net.Listener, error) {
		return nil, &net.OpError{Op: "listen", Net: a.Network(), Addr: a, Err: err}
	}
	host, port, err := splitAddr(addr)
	if err != nil {
		return fail(err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return fail(net.ErrClosed)
	}
	if port == "0" {
		a = n.freeAddr(host)
	}
	if n.listeners[a] != nil {
		return fail(os.NewSyscallError("bind", syscall.EADDRINUSE))
	}
	l := &listener{net: n, addr: a, queue: make(chan *conn, backlog), done: make(chan struct{})}
	n.listeners[a] = l
	return l, nil
}

// Dialer returns a function that dials as the host from, with the shape of
// net.Dialer's DialContext; its network argument is ignored.
//
// A dial to an address where nobody listens is refused at once. While either
// direction is cut, or while the listener has its backlog full, the dial waits
// until that changes, its context ends, or the dial timeout passes.
func (n *Network) Dialer(from string) func(ctx context.Context, network, addr string) (net.Conn, error) {
	return func(ctx context.Context, _, addr string) (net.Conn, error) {
		c, err := n.dial(ctx, from, Addr(addr))
		if err != nil {
			return nil, &net.OpError{Op: "dial", Net: Addr("").Network(), Source: Addr(from), Addr: Addr(addr), Err: err}
		}
		return c, nil
	}
}

func (n *Network) dial(ctx context.Context, from string, addr Addr) (*conn, error) {
	to, _, err := splitAddr(string(addr))
	if err != nil {
		return nil, err
	}
	n.mu.Lock()
	timeout := n.dialTimeout
	n.mu.Unlock()
	var expired <-chan time.Time
	if timeout > 0 {
		t := time.NewTimer(timeout)
		defer t.Stop()
		expired = t.C
	}
	travelled := false // whether the round trip of the connection's set-up is over
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		c, changed, roundTrip, err := n.tryDial(from, to, addr, travelled)
		if c != nil || err != nil {
			return c, err
		}
		var arrived <-chan time.Time
		var trip *time.Timer
		if roundTrip > 0 {
			trip = time.NewTimer(roundTrip)
			arrived = trip.C
		}
		travelled = false
		select {
		case <-arrived:
			travelled = true
		case <-changed:
		case <-expired:
			return nil, timeoutError(fmt.Sprintf("no connection within the dial timeout of %v: the link is cut or the listener's backlog is full", timeout))
		case <-ctx.Done():
		case <-n.done:
		}
		if trip != nil {
			trip.Stop()
		}
	}
}

// tryDial makes the connection if it can be made now. If not, it returns what
// to wait for: a channel that is closed when the topology or a backlog changes,
// or the round trip that setting up the connection takes.
func (n *Network) tryDial(from, to string, addr Addr, travelled bool) (c *conn, changed <-chan struct{}, roundTrip time.Duration, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return nil, nil, 0, net.ErrClosed
	}
	out, back := n.link(from, to), n.link(to, from)
	if n.cut(out) || n.cut(back) {
		return nil, n.awaitChange(), 0, nil
	}
	if !travelled {
		if d := out.draw() + back.draw(); d > 0 {
			return nil, nil, d, nil
		}
	}
	l := n.listeners[addr]
	if l == nil {
		return nil, nil, 0, os.NewSyscallError("connect", syscall.ECONNREFUSED)
	}
	if len(l.queue) == cap(l.queue) {
		return nil, n.awaitChange(), 0, nil
	}
	dialled, accepted := n.newPair(n.freeAddr(from), addr, out, back)
	l.queue <- accepted // Only filled here, under the lock, so there is room.
	return dialled, nil, 0, nil
}

func (n *Network) awaitChange() <-chan struct{} {
	if n.changed == nil {
		n.changed = make(chan struct{})
	}
	return n.changed
}

// freeAddr returns an address of host that was never given out and that nobody
// listens on.
func (n *Network) freeAddr(host string) Addr {
	for {
		a := Addr(net.JoinHostPort(host, strconv.Itoa(n.nextPort)))
		n.nextPort++
		if n.listeners[a] == nil {
			return a
		}
	}
}

// splitAddr checks an address that a caller has given.
func splitAddr(addr string) (host, port string, err error) {
	host, port, err = net.SplitHostPort(addr)
	if err == nil && (host == "" || port == "") {
		err = &net.AddrError{Err: `the in-memory network needs a host name and a port, as in "n0:1"`, Addr: addr}
	}
	return host, port, err
}

// listener is a net.Listener.
type listener struct {
	net   *Network
	addr  Addr
	queue chan *conn    // connections to accept
	done  chan struct{} // closed by close
}

func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.queue:
		l.net.mu.Lock()
		defer l.net.mu.Unlock()
		l.net.wakeDials() // There is room in the backlog now.
		return c, nil
	case <-l.done:
		return nil, &net.OpError{Op: "accept", Net: l.addr.Network(), Addr: l.addr, Err: net.ErrClosed}
	}
}

// Close resets the connections that nobody has accepted. It may be called again.
func (l *listener) Close() error {
	l.net.mu.Lock()
	defer l.net.mu.Unlock()
	l.close()
	return nil
}

func (l *listener) close() {
	if l.net.listeners[l.addr] != l {
		return
	}
	delete(l.net.listeners, l.addr)
	close(l.done)
	for len(l.queue) > 0 {
		select {
		case c := <-l.queue:
			c.resetBoth()
			c.close()
		default: // A running Accept was faster.
		}
	}
	l.net.wakeDials() // They will be refused.
}

func (l *listener) Addr() net.Addr { return l.addr }

package main

import (
	"context"
	"errors"
	"net"
	"sync"
)

// gate stands between one node and the network. While it is cut, the node can
// neither dial nor be dialled, and the connections it had are closed.
type gate struct {
	mu    sync.Mutex
	cut   bool
	conns map[*gatedConn]struct{}
}

var errCut = errors.New("the node is partitioned")

func newGate() *gate { return &gate{conns: map[*gatedConn]struct{}{}} }

func (g *gate) setCut(cut bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.cut = cut
	if cut {
		for c := range g.conns {
			c.Conn.Close() // its owner notices, and closes it too
		}
	}
}

func (g *gate) isCut() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.cut
}

// dial is the node's Config.DialContext.
func (g *gate) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	if g.isCut() {
		return nil, errCut
	}
	c, err := new(net.Dialer).DialContext(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	return g.admit(c)
}

// admit takes c into the care of the gate, or closes it.
func (g *gate) admit(c net.Conn) (net.Conn, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.cut {
		c.Close()
		return nil, errCut
	}
	gc := &gatedConn{c, g}
	g.conns[gc] = struct{}{}
	return gc, nil
}

type gatedConn struct {
	net.Conn
	gate *gate
}

func (c *gatedConn) Close() error {
	c.gate.mu.Lock()
	delete(c.gate.conns, c)
	c.gate.mu.Unlock()
	return c.Conn.Close()
}

// gatedListener is the node's Config.Listener.
type gatedListener struct {
	net.Listener
	gate *gate
}

func (l *gatedListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if c, err = l.gate.admit(c); err == nil {
			return c, nil
		}
	}
}

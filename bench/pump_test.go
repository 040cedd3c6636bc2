package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"sync"
	"testing"
)

// testRegion is the smallest file that holds the largest batches.
const testRegion = 12 << 20

// startPump starts a pump whose syncs go through hook, which must call the
// function it is given to really sync.
func startPump(t *testing.T, hook func(node int, sync func() error) error) (*pump, string) {
	t.Helper()
	dir := t.TempDir()
	p := newPump(testRegion)
	if hook != nil {
		p.sync = func(node int, f *os.File) error {
			return hook(node, func() error { return fdatasync(f) })
		}
	}
	if err := p.Start(dir); err != nil {
		t.Fatal(err)
	}
	return p, dir
}

// readBack returns every payload in a node's file that is in a batch whose
// checksum is right.
func readBack(t *testing.T, dir string, node int) map[string]bool {
	t.Helper()
	file, err := os.ReadFile(pumpFile(dir, node))
	if err != nil {
		t.Fatal(err)
	}
	if len(file) != testRegion {
		t.Fatalf("node %d's file has %d bytes, want %d", node, len(file), testRegion)
	}
	found := make(map[string]bool)
	for len(file) > 0 {
		_, length, ok, err := unseal(file)
		if err != nil || !ok {
			file = file[pumpAlign:]
			continue
		}
		records := binary.LittleEndian.Uint32(file[20:])
		at := pumpHeader
		for range records {
			n := int(binary.LittleEndian.Uint32(file[at:]))
			at += pumpRecordHeader
			found[string(file[at:at+n])] = true
			at += n
		}
		file = file[length:]
	}
	return found
}

// copies counts the nodes whose file holds payload.
func copies(t *testing.T, dir string, payload []byte) int {
	n := 0
	for node := range 3 {
		if readBack(t, dir, node)[string(payload)] {
			n++
		}
	}
	return n
}

func randomPayload(dice *rand.ChaCha8, size int) []byte {
	b := make([]byte, size)
	dice.Read(b)
	return b
}

func TestPumpAcknowledgedPayloadIsInTwoFiles(t *testing.T) {
	p, dir := startPump(t, nil)
	dice := rand.NewChaCha8([32]byte{1})
	for i := range 20 {
		payload := randomPayload(dice, 16+i*1000)
		if err := p.Propose(context.Background(), payload); err != nil {
			t.Fatal(err)
		}
		if n := copies(t, dir, payload); n < 2 {
			t.Fatalf("payload %d was acknowledged while %d files held it, want at least 2", i, n)
		}
	}
	if err := p.Stop(); err != nil {
		t.Fatal(err)
	}
}

func TestPumpConcurrentClients(t *testing.T) {
	p, dir := startPump(t, nil)
	const clients, each = 16, 20
	payload := func(client, i int) []byte {
		return randomPayload(rand.NewChaCha8([32]byte{2, byte(client), byte(i)}), 16+client*10)
	}
	var wg sync.WaitGroup
	for c := range clients {
		wg.Go(func() {
			for i := range each {
				if err := p.Propose(context.Background(), payload(c, i)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if err := p.Stop(); err != nil {
		t.Fatal(err)
	}
	var files [3]map[string]bool
	for node := range files {
		files[node] = readBack(t, dir, node)
	}
	for c := range clients {
		for i := range each {
			n := 0
			for _, f := range files {
				if f[string(payload(c, i))] {
					n++
				}
			}
			if n < 2 {
				t.Errorf("client %d's payload %d is in %d files, want at least 2", c, i, n)
			}
		}
	}
}

func TestPumpOverwritesItsFileFromTheStart(t *testing.T) {
	p, dir := startPump(t, nil)
	dice := rand.NewChaCha8([32]byte{3})
	// Three times the file, so that every node has wrapped around.
	for i := range 3 * testRegion / pumpMaxRecord {
		payload := randomPayload(dice, pumpMaxRecord)
		if err := p.Propose(context.Background(), payload); err != nil {
			t.Fatal(err)
		}
		if i%7 == 0 {
			if n := copies(t, dir, payload); n < 2 {
				t.Fatalf("payload %d was acknowledged while %d files held it, want at least 2", i, n)
			}
		}
	}
	if err := p.Stop(); err != nil {
		t.Fatal(err)
	}
}

// gates lets a test decide when each node's sync returns.
type gates [3]chan struct{}

func newGates() gates {
	return gates{make(chan struct{}), make(chan struct{}), make(chan struct{})}
}

func (g gates) hook(node int, sync func() error) error {
	<-g[node]
	return sync()
}

// waitDurable waits until the leader knows that node has synced batch seq.
func waitDurable(p *pump, node int, seq uint64) {
	for {
		p.ackMu.Lock()
		d := p.durable[node]
		p.ackMu.Unlock()
		if d >= seq {
			return
		}
		runtime.Gosched()
	}
}

func TestPumpOneSyncIsNotEnoughTwoAre(t *testing.T) {
	for first := range 3 {
		for second := range 3 {
			if first == second {
				continue
			}
			t.Run(fmt.Sprintf("node %d then %d", first, second), func(t *testing.T) {
				g := newGates()
				p, _ := startPump(t, g.hook)
				p.mu.Lock()
				b := p.enqueue([]byte("payload"))
				p.mu.Unlock()

				close(g[first])
				waitDurable(p, first, b.seq)
				select {
				case <-b.done:
					t.Errorf("acknowledged when only node %d had synced", first)
				default:
				}
				close(g[second])
				<-b.done
				if b.err != nil {
					t.Error(b.err)
				}
				close(g[3-first-second])
				if err := p.Stop(); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

func TestPumpFailedSyncFailsEveryProposal(t *testing.T) {
	broken := errors.New("the disk is broken")
	for node := range 3 {
		t.Run(fmt.Sprint("node ", node), func(t *testing.T) {
			p, _ := startPump(t, func(n int, sync func() error) error {
				if n == node {
					return broken
				}
				return sync()
			})
			var err error
			for err == nil { // The first ones may be durable on the other two.
				err = p.Propose(context.Background(), []byte("payload"))
			}
			if !errors.Is(err, broken) {
				t.Errorf("Propose returned %v, want the failed sync", err)
			}
			if err := p.Propose(context.Background(), []byte("later")); !errors.Is(err, broken) {
				t.Errorf("a later Propose returned %v, want the failed sync", err)
			}
			if err := p.Stop(); !errors.Is(err, broken) {
				t.Errorf("Stop returned %v, want the failed sync", err)
			}
		})
	}
}

func TestPumpStopEndsWaitingProposals(t *testing.T) {
	before := runtime.NumGoroutine()
	g := newGates()
	syncing := make(chan struct{}, 3)
	p, _ := startPump(t, func(node int, sync func() error) error {
		syncing <- struct{}{}
		return g.hook(node, sync)
	})
	proposed, stopped := make(chan error), make(chan error)
	go func() { proposed <- p.Propose(context.Background(), []byte("payload")) }()
	for range 3 {
		<-syncing
	}
	go func() { stopped <- p.Stop() }()
	if err := <-proposed; err != errPumpStopped {
		t.Errorf("the waiting proposal returned %v, want %v", err, errPumpStopped)
	}
	for _, gate := range g {
		close(gate)
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
	if err := p.Propose(context.Background(), []byte("late")); err != errPumpStopped {
		t.Errorf("Propose after Stop returned %v, want %v", err, errPumpStopped)
	}
	if left := settle(before); left != 0 {
		t.Errorf("%d goroutines are left after Stop", left)
	}
}

func TestPumpProposeEndsWithItsContext(t *testing.T) {
	g := newGates()
	p, _ := startPump(t, g.hook)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := p.Propose(ctx, []byte("payload")); err != context.Canceled {
		t.Errorf("Propose returned %v, want %v", err, context.Canceled)
	}
	for _, gate := range g {
		close(gate)
	}
	if err := p.Stop(); err != nil {
		t.Error(err)
	}
}

func TestPumpRefusesOversizePayload(t *testing.T) {
	p := newPump(testRegion)
	if err := p.Propose(context.Background(), make([]byte, pumpMaxRecord+1)); err != errPumpSize {
		t.Errorf("Propose returned %v, want %v", err, errPumpSize)
	}
}

func TestUnsealRefusesEveryDamagedByte(t *testing.T) {
	b := &batch{seq: 7, records: 1, buf: make([]byte, pumpHeader)}
	b.buf = binary.LittleEndian.AppendUint32(b.buf, 5)
	b.buf = append(b.buf, "hello"...)
	seal(b)
	if len(b.buf) != pumpAlign {
		t.Fatalf("a small batch has %d bytes, want %d", len(b.buf), pumpAlign)
	}
	if seq, length, ok, err := unseal(b.buf); seq != 7 || length != pumpAlign || !ok || err != nil {
		t.Fatalf("unseal = %d, %d, %v, %v", seq, length, ok, err)
	}
	if _, _, ok, err := unseal(b.buf[:pumpAlign-1]); ok || err != nil {
		t.Errorf("a part of a batch: ok = %v, err = %v; want neither", ok, err)
	}
	for i := range b.buf {
		damaged := bytes.Clone(b.buf)
		damaged[i] ^= 0x10
		if _, _, ok, _ := unseal(damaged); ok {
			t.Errorf("a batch with byte %d damaged is taken as whole", i)
		}
	}
}

package client

import (
	"bufio"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"math"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// Change is what a write did to a key.
type Change struct {
	Index   uint64 // of the log entry, which is the key's version
	Key     string
	Value   []byte // nil if Deleted
	Deleted bool
}

// UnmarshalJSON reads what the service writes: bytes that are no text are base64.
func (c *Change) UnmarshalJSON(b []byte) error {
	var shown struct {
		Index           uint64
		Key, Value      string
		Deleted, Base64 bool
	}
	if err := json.Unmarshal(b, &shown); err != nil {
		return err
	}
	key, value := []byte(shown.Key), []byte(shown.Value)
	if shown.Base64 {
		var errKey, errValue error
		key, errKey = base64.StdEncoding.DecodeString(shown.Key)
		value, errValue = base64.StdEncoding.DecodeString(shown.Value)
		if err := errors.Join(errKey, errValue); err != nil {
			return err
		}
	}
	*c = Change{Index: shown.Index, Key: string(key), Value: value, Deleted: shown.Deleted}
	if c.Deleted {
		c.Value = nil
	}
	return nil
}

// List returns the keys that begin with prefix, in order, as of index.
func (c *Client) List(ctx context.Context, prefix string, level Consistency) (keys []Change, index uint64, err error) {
	a, err := c.read(ctx, "/kv/?prefix="+url.QueryEscape(prefix)+"&consistency="+url.QueryEscape(string(level)))
	if err != nil {
		return nil, 0, err
	}
	var list struct {
		Index uint64
		Keys  []Change
	}
	if err := json.Unmarshal(a.body, &list); err != nil {
		return nil, 0, fmt.Errorf("kv: the list can't be read: %w", err)
	}
	return list.Keys, list.Index, nil
}

// Now makes Watch begin with the changes to come.
const Now = math.MaxUint64

const (
	maxLine = 8 << 20          // bytes of one change; text may be six times as long in JSON
	silence = 20 * time.Second // after which a node that should send signs of life is given up
)

var errFallenBehind = errors.New("the watch was too slow or asks for too old changes")

// Watch returns the changes of keys that begin with prefix after index, in the
// order of the log, each once and none left out, until ctx ends or the loop is
// left. When a node fails it goes on with another. The last step of the loop has
// the error: ctx's, ErrHistoryGone, or a *StatusError. History is gone when each
// node has said so, or some have and the others have failed for a second or more.
func (c *Client) Watch(ctx context.Context, prefix string, after uint64) iter.Seq2[Change, error] {
	return func(yield func(Change, error) bool) {
		position, pause := after, firstPause
		gone := map[int]bool{} // nodes whose history begins after position: it won't reach back again
		for node := int(c.node.Load() % uint32(len(c.addrs))); ; node = (node + 1) % len(c.addrs) {
			if gone[node] {
				continue
			}
			was := position
			stopped, err := c.watchNode(ctx, c.addrs[node], prefix, &position, yield)
			if position != was {
				clear(gone)
				pause = firstPause
			}
			var status *StatusError
			switch {
			case stopped:
				return
			case ctx.Err() != nil:
				err = ctx.Err()
			case errors.Is(err, errFallenBehind):
				// Nodes that have not been restarted may have more.
				gone[node], pause = true, firstPause
				if len(gone) < len(c.addrs) {
					continue
				}
				err = fmt.Errorf("%w: %w", ErrHistoryGone, err)
			case errors.As(err, &status) && status.Code < 500:
			case len(gone) > 0 && pause == maxPause:
				err = fmt.Errorf("%w; the others were asked in vain: %w", ErrHistoryGone, err)
			default:
				err = wait(ctx, pause)
				pause = min(2*pause, maxPause)
			}
			if err != nil {
				yield(Change{}, err)
				return
			}
		}
	}
}

func wait(ctx context.Context, pause time.Duration) error {
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// watchNode takes changes from one node and moves position along. It returns
// true if the loop was left.
func (c *Client) watchNode(ctx context.Context, addr, prefix string, position *uint64, yield func(Change, error) bool) (left bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	alive := time.AfterFunc(c.AttemptTimeout, cancel)
	defer alive.Stop()
	path := addr + "/kv/?watch=1&prefix=" + url.QueryEscape(prefix)
	if *position != Now {
		path += "&after=" + strconv.FormatUint(*position, 10)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, path, nil)
	if err != nil {
		return false, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return false, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<16)) // what came of the explanation is better than nothing
		if resp.StatusCode == http.StatusGone {
			return false, fmt.Errorf("%w: %s", errFallenBehind, text)
		}
		return false, &StatusError{resp.StatusCode, strings.TrimSpace(string(text))}
	}
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(nil, maxLine)
	event, data, id := "", "", *position
	for alive.Reset(silence); lines.Scan(); alive.Reset(silence) {
		name, value, _ := strings.Cut(lines.Text(), ":")
		value = strings.TrimPrefix(value, " ")
		switch name {
		case "event":
			event = value
		case "data":
			data = value
		case "id":
			if id, err = strconv.ParseUint(value, 10, 64); err != nil {
				return false, fmt.Errorf("kv: the ID of an event is no index: %w", err)
			}
		case "": // the end of the event
			switch {
			case event == "gone":
				return false, fmt.Errorf("%w: %s", errFallenBehind, data)
			case event != "":
				return false, fmt.Errorf("%s: %s", event, data)
			case data != "":
				var change Change
				if err := json.Unmarshal([]byte(data), &change); err != nil {
					return false, fmt.Errorf("kv: a change can't be read: %w", err)
				}
				alive.Stop() // the user's time is not the node's
				*position = id
				if !yield(change, nil) {
					return true, nil
				}
			default:
				*position = id
			}
			event, data = "", ""
		}
	}
	if err := lines.Err(); err != nil {
		return false, err
	}
	return false, io.ErrUnexpectedEOF
}
